"""The dynamic maps by arithmetic: one straight line a decade, for values and for codes.

Codes are counted from zero: k = |code - 127| (0 to 128) in the signed map, code + 1 (1 to 256) in
the unsigned one. With e = floor(log2 k), the codes of a decade are 2^e <= k < 2^(e + 1), and

    value = fma(slope[e % 8], k, offset[e % 8])

Back, e is first guessed from the upper half of |y|'s bit pattern, which is nearly a logarithm: that
is right or one too low, and `split` tells. With i = e (signed map) or e - 1 (unsigned map),

    i = guess + (|y| >= split[guess])
    m = min(fma(step[i], |y|, INTERCEPT), BELOW_TWO)
    k = floor(m * 2^e)

which takes the leading bits of m's pattern; below `least` the code is that of zero. All is float32,
each operation rounded once: every target computes the same bits. Boundaries lie within 1.8e-7
(relative) of the middle between exact values, and values within 6.3e-7 of bitsandbytes' tables.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction

# The guess is 0 up to 2^-21, and then grows by 5 in 16 powers of two.
_LOWEST_HALF = 106 << 7
_GROWTH, _GROWTH_SHIFT = 5, 11

BELOW_TWO = 2.0 - 2.0**-23


def pattern_of(value: float) -> int:
    """The bits of a float32 number."""
    (pattern,) = struct.unpack("<I", struct.pack("<f", value))
    return int(pattern)


def from_pattern(pattern: int) -> float:
    """The float32 number of these bits."""
    (value,) = struct.unpack("<f", struct.pack("<I", pattern))
    return float(value)


def float32(value: Fraction | float) -> float:
    """The nearest float32 number, ties to even."""
    exact = Fraction(value)
    unit = Fraction(2) ** (max(math.frexp(float(exact))[1], -125) - 24)
    return float(round(exact / unit) * unit)


def guess(size: float) -> int:
    """The line of a magnitude, or the one before."""
    half = max((pattern_of(size) >> 16) - _LOWEST_HALF, 0)
    return half * _GROWTH >> _GROWTH_SHIFT


def octave(field: int, splits: tuple[float, ...], signed: bool) -> int:
    """An entry of `Lines.octaves`, for lines that end at these splits."""
    first, behind = (from_pattern(number << 23) for number in (field, field + 1))
    e = sum(split <= first for split in splits) + (0 if signed else 1)
    inside = [split for split in splits if first < split < behind]
    carry = (1 << 23) - (pattern_of(inside[0]) & 0x7FFFFF) if inside else 0
    return ((127 + e - field) << 23) + carry


# A sum rounds up to a boundary from half a unit below it: the intercept makes up for that.
INTERCEPT = float32(Fraction(8, 9)) - 2.0**-24


@dataclass(frozen=True)
class Lines:
    """The lines of a map, as kernels look them up; the names are explained above."""

    signed: bool
    slope: tuple[float, ...]
    offset: tuple[float, ...]
    split: tuple[float, ...]
    step: tuple[float, ...]
    least: float

    def tables(self) -> list[tuple[float, ...]]:
        """What kernels look up: slopes of 2 k, offsets, splits and steps."""
        return [tuple(slope / 2 for slope in self.slope), self.offset, self.split, self.step]

    def octaves(self) -> list[int]:
        """What turns the pattern of a magnitude below 2 into a line, by its exponent's field.

        The sum of both has 127 + e in that field: where a line ends inside the octave, the mantissa
        carries from there on. GPUs look this up instead of guess and split.
        """
        return [octave(field, self.split, self.signed) for field in range(128)]

    def value(self, k: int) -> float:
        """The value of the k-th code."""
        e = max(k.bit_length() - 1, 0) % 8
        return float32(Fraction(self.slope[e]) * k + Fraction(self.offset[e]))

    def number(self, size: float) -> int:
        """The k of a magnitude up to 1, a float32 number."""
        if size < self.least:
            return 0 if self.signed else 1
        line = guess(size)
        line += size >= self.split[line]
        m = float32(Fraction(self.step[line]) * Fraction(size) + Fraction(INTERCEPT))
        fraction = pattern_of(min(m, BELOW_TWO)) - (126 << 23)
        return fraction >> (23 - line if self.signed else 22 - line)

    def first(self, k: int) -> float:
        """The least magnitude of which the number is k or more."""
        e = k.bit_length() - 1
        line = e if self.signed else e - 1
        if k == 1 << e:
            return self.split[line - 1] if line > 0 else self.least
        return self.crossing(k, line)

    def crossing(self, k: int, line: int) -> float:
        """The least magnitude at which a line reaches k."""
        m = Fraction(k, 1 << (k.bit_length() - 1))
        near = pattern_of(float32((m - Fraction(8, 9)) / Fraction(self.step[line])))
        while self.number(from_pattern(near)) >= k:
            near -= 1
        while self.number(from_pattern(near)) < k:
            near += 1
        return from_pattern(near)


def _signed_value(k: int) -> Fraction:
    if k <= 1:
        return Fraction(55 * k, 10**8)
    return Fraction(1) if k == 128 else _of_decade(k, -6)


def _unsigned_value(k: int) -> Fraction:
    return Fraction(k // 256) if k in (1, 256) else _of_decade(k, -7)


def _of_decade(k: int, power: int) -> Fraction:
    """10^(e + power) * (0.1 + 0.9 * (k - 2^e + 1/2) / 2^e)."""
    e = k.bit_length() - 1
    part = Fraction(2 * k + 1, 2 << e)
    return Fraction(10) ** (e + power) * (Fraction(9, 10) * part - Fraction(4, 5))


def _split(value: Callable[[int], Fraction], e: int) -> float:
    """The middle between the decade's last value and the next one."""
    last = (2 << e) - 1
    return float32((value(last) + value(last + 1)) / 2)


def _signed_lines() -> Lines:
    slope = [Fraction(55, 10**8), *(_slope(e, -6) for e in range(1, 7)), Fraction(0)]
    offset = [Fraction(0), *(_offset(e, -6) for e in range(1, 7)), Fraction(1)]
    least = Fraction(275, 10**9)
    # The first line leads through 1 at the least number that is not 0 (between which and the float
    # below half a unit is less), and the last one stays between 1 and 1 + 2^-7.
    first = (Fraction(1, 9) + Fraction(1, 2**25)) / least
    step = [first, *(_step(e, -6) for e in range(1, 7)), Fraction(23, 200)]
    split = [*(_split(_signed_value, e) for e in range(7)), math.inf]
    lines = Lines(True, _rounded(slope), _rounded(offset), tuple(split), _rounded(step), 0.0)
    return replace(lines, least=lines.crossing(1, 0))


def _unsigned_lines() -> Lines:
    # 0 (k = 1, e = 0) and 1 (k = 256, e = 8) share the line through both.
    ends = Fraction(1, 255)
    slope = [ends, *(_slope(e, -7) for e in range(1, 8))]
    offset = [-Fraction(float32(ends)), *(_offset(e, -7) for e in range(1, 8))]
    step = [*(_step(e, -7) for e in range(1, 8)), Fraction(23, 200)]
    split = [*(_split(_unsigned_value, e) for e in range(1, 8)), math.inf]
    least = float32(_unsigned_value(2) / 2)
    return Lines(False, _rounded(slope), _rounded(offset), tuple(split), _rounded(step), least)


def _slope(e: int, power: int) -> Fraction:
    return Fraction(10) ** (e + power) * Fraction(9, 10 << e)


def _offset(e: int, power: int) -> Fraction:
    return Fraction(10) ** (e + power) * (Fraction(9, 20 << e) - Fraction(4, 5))


def _step(e: int, power: int) -> Fraction:
    return Fraction(10, 9) / Fraction(10) ** (e + power)


def _rounded(numbers: list[Fraction]) -> tuple[float, ...]:
    return tuple(map(float32, numbers))


SIGNED_LINES = _signed_lines()
UNSIGNED_LINES = _unsigned_lines()
