"""The part of one parameter's state that a process holds, in the block grid of the whole parameter.

Blocks never depend on the number of processes. Along the first dimension a shard has whole rows of
blocks, and their scales with them. Where a shard ends inside a block (columns, vectors), every
process has the scales of all blocks of its rows, and the greatest of all parts makes the scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from optfactory.sharding.box import Box
from optfactory.sharding.dtensors import Sharding, sharded_dim
from optfactory.state.codec import BlockGrid


@dataclass(frozen=True)
class Piece:
    """What a process holds of a parameter and of its state.

    Attributes:
        sharding: of the parameter, its codes and states.
        scales: of the scales of state in blocks.
        pairs: of pairs of elements; None where not every process holds whole ones.
        grid: the block grid of the local part, where no block is cut.
        cut: the dimensions of the mesh along which blocks are cut.
        whole: the block grid of the whole parameter.
    """

    sharding: Sharding
    scales: Sharding
    pairs: Sharding | None
    grid: BlockGrid
    cut: tuple[int, ...]
    whole: BlockGrid

    @classmethod
    def of(cls, sharding: Sharding, grid: BlockGrid, *, blocks: bool, tensor_wise: bool) -> Piece:
        """The piece of this process.

        Args:
            grid: the block grid of the whole parameter.
            blocks: whether there are blocks, which share a scale and could be cut.
            tensor_wise: whether there is one scale for the whole parameter.
        """
        placements, copied = [], []
        dims = set() if tensor_wise else {dim for _, dim in sharding.cuts}
        kept = {dim for dim in dims if _keeps_blocks(sharding, grid, dim)}
        for index, placement in enumerate(sharding.placements):
            dim = sharded_dim(placement)
            is_cut = dim is not None and sharding.mesh.size(index) > 1
            if dim is None or dim not in kept:
                placements.append(sharding.copied)
                copied += [index] if is_cut else []
            else:
                placements.append(placement)
        scales = Sharding(grid.scales_shape, sharding.mesh, tuple(placements))
        cut = tuple(copied) if blocks and not tensor_wise else ()
        all_pairs = BlockGrid.of(sharding.shape, 2)
        pairs = None
        if keeps_pairs(sharding, all_pairs):
            pairs = replace(sharding, shape=all_pairs.scales_shape)
        return cls(sharding, scales, pairs, _local_grid(sharding.box, scales, grid), cut, grid)

    @property
    def box(self) -> Box:
        """The elements of the parameter that this process holds."""
        return self.sharding.box

    @property
    def scale_groups(self) -> tuple[Any, ...]:
        """The process groups whose members hold parts of the same blocks."""
        return self.sharding.groups_of(iter(self.cut))

    def element_scales(self, scales: Tensor) -> Tensor:
        """The scale of each element that this process holds, where blocks are cut.

        Args:
            scales: of all blocks of its rows.
        """
        _, counts, blocks, _ = self.fragments.to(scales.device).unbind(1)
        return scales.reshape(-1)[blocks].repeat_interleave(counts).view(self.box.sizes)

    @property
    def _has_rows(self) -> bool:
        return len(self.whole.scales_shape) > 1

    @cached_property
    def fragments(self) -> Tensor:
        """The parts of blocks that this process holds, in the order of its elements.

        Returns:
            int64 [fragments, 4]: the first element in the local part, the number of elements, the
            number of the block among the local scales, and that of the first element in the whole.
        """
        words: dict[str, Any] = {"dtype": torch.int64, "device": "cpu"}
        box, cols, size = self.box, self.whole.cols, self.whole.block_size
        inner = max((d for d, size in enumerate(box.shape) if box.sizes[d] != size), default=0)
        length = math.prod(box.sizes[inner:])
        starts = torch.tensor(box.run_starts(inner) if length else [], **words)
        row, col = starts // max(cols, 1), starts % max(cols, 1)
        first_block = col // size
        counts = (col + length - 1) // size - first_block + 1
        run = torch.repeat_interleave(torch.arange(len(starts), **words), counts)
        ahead = torch.cumsum(counts, 0) - counts
        block = first_block[run] + torch.arange(len(run), **words) - ahead[run]
        begin = torch.maximum(block * size, col[run])
        end = torch.minimum((block + 1) * size, col[run] + length)
        held = self.scales.box
        number = block - held.offsets[-1]
        if self._has_rows:
            number += (row[run] - held.offsets[0]) * held.sizes[1]
        ahead_in_run = begin - col[run]
        columns = [run * length + ahead_in_run, end - begin, number, starts[run] + ahead_in_run]
        return torch.stack(columns, dim=1)


def keeps_pairs(sharding: Sharding, pairs: BlockGrid) -> bool:
    """Whether every process holds whole ones of these pairs of elements, as blocks of two."""
    return all(_keeps_blocks(sharding, pairs, dim) for _, dim in sharding.cuts)


def _keeps_blocks(sharding: Sharding, grid: BlockGrid, dim: int) -> bool:
    """Whether cutting a dimension of the parameter, on every process, leaves blocks whole.

    The scales, cut in the same way, must then be those of just these blocks.
    """
    if len(grid.scales_shape) > 1 and dim == 0:
        return True  # blocks run inside rows
    if dim >= len(grid.scales_shape):
        return False
    parts: list[int] = [sharding.mesh.size(index) for index, other in sharding.cuts if other == dim]
    elements, unit = sharding.shape[dim], math.prod(sharding.shape[dim + 1 :])
    if len(parts) > 1 and elements % math.prod(parts):
        return False
    share = -(-elements // math.prod(parts))
    blocks = -(-grid.cols // grid.block_size)
    own_blocks, rest = divmod(share * unit, grid.block_size)
    return rest == 0 and -(-blocks // math.prod(parts)) == own_blocks


def _local_grid(box: Box, scales: Sharding, grid: BlockGrid) -> BlockGrid:
    shape = scales.box.sizes
    if box.numel == 0 or len(grid.scales_shape) < 2:
        return BlockGrid(1, box.numel, grid.block_size, shape)
    return BlockGrid(box.sizes[0], box.numel // box.sizes[0], grid.block_size, shape)
