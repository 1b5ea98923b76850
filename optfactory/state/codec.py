"""8-bit state in plain torch: the block grid, quantization and dequantization.

The kernels in `kernels/` do the same arithmetic; this module serves the portable backend and
anyone who wants to look into a checkpoint.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from optfactory.rules.options import KernelOptions
from optfactory.state.minifloats import QUOTIENTS_BY, Minifloat
from optfactory.state.quantmap import QuantizationMap

# What codes of blocks mean.
CodeMap = QuantizationMap | Minifloat


@dataclass(frozen=True)
class BlockGrid:
    """How the elements of a tensor are cut into blocks that share a scale.

    A tensor of shape [S0, S1, ...] is seen as S0 rows of S1 * S2 * ... elements. Blocks run
    inside rows, so a shard along the first dimension never cuts one; the last block of a row may
    be short. A 1-D tensor is one row. Other libraries' checkpoints see every tensor as one row
    (`flat`), and tensor-wise state has one block for all elements (`whole`).

    Attributes:
        rows, cols: the tensor seen as a matrix.
        block_size: elements per block.
        scales_shape: shape of the scales: [S0, ceil(cols / block_size)], 1-D for a 1-D tensor.
    """

    rows: int
    cols: int
    block_size: int
    scales_shape: tuple[int, ...]

    @classmethod
    def of(
        cls, shape: tuple[int, ...], block_size: int, *, flat: bool = False, whole: bool = False
    ) -> BlockGrid:
        """The grid of a tensor of this (global) shape."""
        numel = math.prod(shape)
        if whole:
            return cls(1, numel, max(numel, 1), (1,))
        if flat or len(shape) < 2 or numel == 0:
            return cls(1, numel, block_size, (-(-numel // block_size),))
        cols = numel // shape[0]
        return cls(shape[0], cols, block_size, (shape[0], -(-cols // block_size)))

    @property
    def blocks(self) -> int:
        """The number of blocks."""
        return self.rows * -(-self.cols // self.block_size)


def quantize(
    x: Tensor, qmap: CodeMap, grid: BlockGrid, options: KernelOptions
) -> tuple[Tensor, Tensor]:
    """Quantize a float32 tensor to 8 bits per element and one float32 scale per block of a grid.

    scale = max(max(x), -min(x) / -qmap.values[0]) for a signed map, max(x) for an unsigned one, or
    as `minifloats` says; the code is that of the value nearest to x / scale, as the map defines it.
    In an unsigned map a value above 0 never takes the code of 0, if `options.floors`. Elements that
    are not finite take the code of 0 and do not enter the scale.

    Returns:
        codes: uint8, of x's shape; absmax: float32, shaped as `grid.scales_shape`.
    """
    x = x.nan_to_num(0.0, 0.0, 0.0)
    scales = block_scales(x, qmap, grid, options)
    return encode(x, spread(scales, grid).reshape(x.shape), qmap, options), scales


def block_scales(x: Tensor, qmap: CodeMap, grid: BlockGrid, options: KernelOptions) -> Tensor:
    """The scales of a grid's blocks, shaped as `grid.scales_shape`, of finite numbers."""
    blocks = _to_blocks(x, grid)
    if blocks.numel() == 0:
        return x.new_zeros(grid.scales_shape, dtype=torch.float32)
    scales = _scales(blocks.amax(dim=2), blocks.neg().amax(dim=2), qmap, options)
    return scales.reshape(grid.scales_shape)


def scattered_scales(
    x: Tensor, numbers: Tensor, count: int, qmap: CodeMap, options: KernelOptions
) -> Tensor:
    """The scales that parts of blocks need by themselves; 0 for blocks without elements.

    Args:
        x: finite numbers.
        numbers: of the block of each, from 0 on and less than `count`; int64.
    """
    positive, negative = (
        torch.zeros(count, dtype=torch.float32, device=x.device).scatter_reduce_(
            0, numbers.flatten(), values.flatten(), "amax"
        )
        for values in (x, -x)
    )
    return _scales(positive, negative, qmap, options)


def _scales(positive: Tensor, negative: Tensor, qmap: CodeMap, options: KernelOptions) -> Tensor:
    """The scales of blocks from the greatest of their values, and of these with the other sign."""
    # Adding 0 turns a -0 into the +0 that kernels store.
    positive, negative = positive.clamp_min(0) + 0.0, negative.clamp_min(0) + 0.0
    if isinstance(qmap, Minifloat):
        return qmap.scales(positive, negative)
    lowest = -qmap.values[0] if qmap.signed and not options.bitsandbytes else 1.0
    largest = torch.finfo(torch.float32).max
    return torch.maximum(positive, negative / lowest).clamp_max(largest)


def encode(x: Tensor, scales: Tensor, qmap: CodeMap, options: KernelOptions) -> Tensor:
    """The codes, uint8, of finite numbers whose scales, one for each, are known."""
    y = quotients(x, scales, qmap)
    if isinstance(qmap, Minifloat):
        return qmap.nearest_codes(y)
    codes = _codes_by_keys(y, qmap)
    if qmap.signed and options.bitsandbytes:
        codes = _fix_sign(torch.where(scales > 0, codes, 0), x, qmap)
    if not qmap.signed and options.floors:
        codes = torch.where((codes == 0) & (x > 0), 1, codes)
    return codes.to(torch.uint8)


def decode(codes: Tensor, scales: Tensor, qmap: CodeMap) -> Tensor:
    """The float32 values of codes: qmap.values[code] times its scale."""
    return _table(qmap.values, codes.device)[codes.long()] * scales


def dequantize(codes: Tensor, absmax: Tensor, qmap: CodeMap, grid: BlockGrid) -> Tensor:
    """The float32 values of codes: qmap.values[code] * absmax of its block."""
    return decode(codes, spread(absmax, grid).reshape(codes.shape), qmap)


def spread(absmax: Tensor, grid: BlockGrid) -> Tensor:
    """The scale of each element, [rows, cols], from those of the blocks."""
    scales = absmax.reshape(grid.rows, -1).repeat_interleave(grid.block_size, dim=1)
    return scales[:, : grid.cols]


def quantize_blockwise(x: Tensor, qmap: CodeMap, block_size: int = 256) -> tuple[Tensor, Tensor]:
    """`quantize` on the grid of x's rows, with default options."""
    return quantize(x, qmap, BlockGrid.of(tuple(x.shape), block_size), KernelOptions())


def dequantize_blockwise(
    codes: Tensor, absmax: Tensor, qmap: CodeMap, block_size: int = 256
) -> Tensor:
    """`dequantize` on the grid of the tensor's rows."""
    return dequantize(codes, absmax, qmap, BlockGrid.of(tuple(codes.shape), block_size))


def _fix_sign(codes: Tensor, x: Tensor, qmap: QuantizationMap) -> Tensor:
    """As bitsandbytes, move a code by one if its value's sign is not that of x."""
    differs = torch.signbit(_table(qmap.values, x.device)[codes]) != torch.signbit(x)
    return torch.where(differs, (codes + torch.where(x > 0, 1, 255)) % 256, codes)


def _to_blocks(x: Tensor, grid: BlockGrid) -> Tensor:
    """X as [rows, blocks per row, block_size], short blocks filled up with zeros."""
    rows = x.reshape(grid.rows, grid.cols)
    padded = F.pad(rows, (0, -grid.cols % grid.block_size))
    return padded.reshape(grid.rows, -1, grid.block_size)


def quotients(x: Tensor, scales: Tensor, qmap: CodeMap) -> Tensor:
    """Numbers divided by their scales, or by 1 instead of 0, as kernels/shared/scaling.cuh does."""
    scales = torch.where(scales > 0, scales, 1.0)
    if isinstance(qmap, QuantizationMap) and qmap.lines is None:
        return x / scales
    # A power of two keeps the reciprocal normal; all that it changes is rounded once either way.
    ones = torch.ones_like(scales)
    lifts = ones.masked_fill(scales < 2.0**-120, 2.0**80).masked_fill(scales > 2.0**120, 2.0**-80)
    reciprocals = ones / (scales * lifts)
    if isinstance(qmap, Minifloat):
        reciprocals = reciprocals * QUOTIENTS_BY
    return (x * lifts) * reciprocals


def _codes_by_keys(y: Tensor, qmap: QuantizationMap) -> Tensor:
    """`qmap.nearest_code` of each number, as `QuantizationMap.keys` explains it; int32."""
    bits = y.view(torch.int32)
    codes = _keys(qmap, y.device).index_select(0, ((bits >> 16) + 32768).flatten()).view(y.shape)
    low = bits ^ (bits >> 31) if qmap.signed else bits
    return (codes + (low & 0xFFFF)) >> 16


@cache
def _keys(qmap: QuantizationMap, device: torch.device) -> Tensor:
    return torch.tensor(qmap.all_keys(floors=False), dtype=torch.int32, device=device)


@cache
def _table(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)
