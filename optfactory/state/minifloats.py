"""Small floats as codes of blocks that share a scale: 8 and 4 bits an element.

| format | bits | sign | exponent | mantissa | least number by the largest |
|---|---|---|---|---|---|
| e4m3 | 8 | yes | 4 | 3 | 2^-17.8, and 0 |
| e5m3 | 8 | no | 5 | 3 | 2^-31.9 |
| e2m1 | 4 | yes | 2 | 1 | 1/12, and 0 |
| e3m1 | 4 | no | 3 | 1 | 2^-7.6 |

Those with a sign are the OCP's (2023), with their numbers by a power of two: 2^-8 of
`torch.float8_e4m3fn`, 2^-2 of FP4. States that are never negative need neither a sign nor, as
their root divides a step, a zero (Li et al. 2023, arXiv:2309.01507): what is less becomes the least
number, and only in a block of zeros, whose scale is 0, a code decodes to 0.

A scale is the greatest magnitude of a block divided by the largest number of the format. With
y = |x * (1 / scale) * QUOTIENTS_BY|, the factor being so much more than 1 that the greatest takes
the last code whatever is rounded on its way, and with as many random bits as are cut off,

    signed    code = (bits(y < least normal ? y + least normal : y) + random) >> cut
    unsigned  code = (bits(max(y, least)) + random) >> cut

but for the format's bias, at most the code of the largest number: up with the probability of what
is cut off. All is float32, each operation rounded once. No code stands for infinity, NaN or -0.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

QUOTIENTS_BY = 1 + 2.0**-22


@dataclass(frozen=True)
class Minifloat:
    """A format of numbers below 2.

    Attributes:
        name: as `optfactory.rules.codegen` calls it; also of what the codes mean.
        signed: whether the uppermost bit is a sign; codes of other formats have no 0.
        exponent, mantissa: bits of a code.
        last_code: of the largest number.
    """

    name: str
    signed: bool
    exponent: int
    mantissa: int
    last_code: int

    @property
    def random_bits(self) -> int:
        """Bits of float32 that are cut off."""
        return 23 - self.mantissa

    @property
    def zero_code(self) -> int:
        """The code of 0, or of the least number."""
        return 0

    @property
    def one_code(self) -> int:
        """The code of 1."""
        return self.values.index(1.0)

    @property
    def sign(self) -> int:
        """The bit of negative numbers."""
        return 1 << (self.exponent + self.mantissa)

    @property
    def largest(self) -> float:
        """The largest number that is used."""
        return self.values[self.last_code]

    @cached_property
    def values(self) -> tuple[float, ...]:
        """What codes stand for, those of which none are written included."""
        sizes = [self._value(code) for code in range(self.sign)]
        return (*sizes, *(-size for size in sizes)) if self.signed else tuple(sizes)

    def _value(self, code: int) -> float:
        exponent, part = code >> self.mantissa, (code & (2**self.mantissa - 1)) / 2**self.mantissa
        below = 1 - 2**self.exponent  # the exponent that the field 0 stands for
        if self.signed and exponent == 0:
            return float(part * 2.0 ** (below + 1))
        return float((1 + part) * 2.0 ** (below + exponent))

    def scales(self, positive: Tensor, negative: Tensor) -> Tensor:
        """The scales of blocks of which these are the greatest magnitudes by sign."""
        return torch.maximum(positive, negative) / self.largest

    def codes_at_random(self, y: Tensor, random: Tensor) -> Tensor:
        """The codes of quotients, uint8.

        Args:
            random: `random_bits` for each.
        """
        size = y.abs() if self.signed else y
        offset = (128 - 2**self.exponent) << 23
        if self.signed:
            least = 2.0 ** (2 - 2**self.exponent)
            small = size < least
            bits = torch.where(small, size + least, size).view(torch.int32).long()
            bits -= torch.where(small, 1 << 23, 0)
        else:
            bits = size.clamp_min(2.0 ** (1 - 2**self.exponent)).view(torch.int32).long()
        codes = (bits + random - offset) >> self.random_bits
        return self._with_sign(codes.clamp_max(self.last_code), y)

    def nearest_codes(self, y: Tensor) -> Tensor:
        """The codes of the nearest numbers to quotients, uint8; the lower one of two."""
        sizes = torch.tensor(
            self.values[: self.last_code + 1], dtype=torch.float64, device=y.device
        )
        middles = (sizes[:-1] + sizes[1:]) / 2
        codes = torch.bucketize((y.abs() if self.signed else y).double(), middles)
        return self._with_sign(codes, y)

    def _with_sign(self, codes: Tensor, y: Tensor) -> Tensor:
        if self.signed:
            codes = torch.where((y < 0) & (codes > 0), codes | self.sign, codes)
        return codes.to(torch.uint8)


E4M3 = Minifloat("e4m3", True, 4, 3, 0x7E)
E5M3 = Minifloat("e5m3", False, 5, 3, 0xFF)
E2M1 = Minifloat("e2m1", True, 2, 1, 0x7)
E3M1 = Minifloat("e3m1", False, 3, 1, 0xF)
MINIFLOATS = {item.name: item for item in (E4M3, E5M3, E2M1, E3M1)}


def packed(codes: Tensor) -> Tensor:
    """Codes of 4 bits, two in a byte, the first in its upper half: [..., n] as [..., n / 2]."""
    return codes[..., ::2] << 4 | codes[..., 1::2]


def unpacked(pairs: Tensor) -> Tensor:
    """The codes in pairs: [..., n / 2] as [..., n]."""
    return torch.stack((pairs >> 4, pairs & 15), dim=-1).flatten(-2)
