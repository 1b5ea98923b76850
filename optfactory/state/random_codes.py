"""8-bit codes rounded at random, in plain torch; see `optfactory.state.positions`."""

from __future__ import annotations

import torch
from torch import Tensor

from optfactory.rules.options import KernelOptions
from optfactory.state.codec import CodeMap, decode, encode, quotients
from optfactory.state.minifloats import Minifloat
from optfactory.state.positions import THIRD, Positions, positions_of
from optfactory.state.quantmap import QuantizationMap

_HALF = 126 << 23


def encode_at_random(
    x: Tensor, scales: Tensor, qmap: CodeMap, options: KernelOptions, random: Tensor
) -> Tensor:
    """Codes, uint8, of which a number's value is kept on the average.

    In an unsigned map a value above 0 never takes the code of 0, if `options.floors`.

    Args:
        x: finite numbers.
        scales: of each number.
        random: `qmap.random_bits` random bits for each, int64; the leading ones count most.
    """
    if isinstance(qmap, Minifloat):
        return qmap.codes_at_random(quotients(x, scales, qmap), random)
    if qmap.lines is None:
        return _by_values(x, scales, qmap, options, random)
    y = quotients(x, scales, qmap)
    k = _positions(y.abs() if qmap.signed else y, positions_of(qmap.lines)) + (random >> 9) >> 23
    if qmap.signed:
        codes = qmap.zero_code + torch.where(y < 0, -k, k)
    else:
        codes = torch.where(x > 0, k - 1, 0)
        codes = torch.where((codes < 1) & (x > 0), int(options.floors), codes)
    return codes.clamp(0, 255).to(torch.uint8)


def _positions(size: Tensor, positions: Positions) -> Tensor:
    """Positions in units of 2^-23, int64."""

    def of(numbers: tuple[float, ...]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.float32, device=size.device)[line]

    splits = torch.tensor(positions.split, dtype=torch.float32, device=size.device)
    line = torch.bucketize(size, splits, right=True)
    m = _fma(of(positions.step), size, of(positions.start))
    m = torch.minimum(m, _fma(m, THIRD, of(positions.bend)))
    if positions.signed:
        m = torch.minimum(m, _fma(size, positions.first, 0.5))
    else:
        m = torch.where(size < positions.least, _fma(size, positions.first, 0.75), m)
    e = line if positions.signed else line + 1
    return (m.view(torch.int32).long() - _HALF) << e


def _fma(a: Tensor, b: Tensor | float, c: Tensor | float) -> Tensor:
    """Float32 a b + c, nearly always rounded once only; MPS has no float64."""
    if a.device.type == "mps":
        return a * b + c
    return (a.double() * b + c).float()


def _by_values(
    x: Tensor, scales: Tensor, qmap: QuantizationMap, options: KernelOptions, random: Tensor
) -> Tensor:
    """The nearest code, or that on the number's other side by the part of the distance.

    Its probability is |x - v| / |v' - v|, where v and v' are the values of both.
    """
    codes = encode(x, scales, qmap, options)
    nearest = decode(codes, scales, qmap)
    lowest = (x > 0).int() if options.floors and not qmap.signed else 0
    others = (codes.int() + torch.where(x > nearest, 1, -1)).clamp_max(255)
    others = torch.maximum(others, torch.as_tensor(lowest, dtype=torch.int32, device=x.device))
    distance = (decode(others, scales, qmap) - nearest).abs()
    uniform = (random >> 8).float() * 2.0**-24
    return torch.where(uniform * distance < (x - nearest).abs(), others.to(torch.uint8), codes)
