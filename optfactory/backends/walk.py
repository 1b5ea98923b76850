"""In which order kernels go through what is here of a tensor, and where that is in the whole."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from optfactory.errors import ConfigError
from optfactory.sharding.box import Box, Runs
from optfactory.step.buckets import Bucket
from optfactory.step.slots import Slot


@dataclass(frozen=True)
class Walk:
    """The blocks of elements of one tensor.

    Attributes:
        rows, cols: blocks run inside rows; cut blocks do not follow from them.
        element, stride: the number in the whole tensor of the first element, and from row to row;
            random bits depend on it.
        parts: of cut blocks, `Piece.fragments`; else None.
    """

    rows: int
    cols: int
    element: int
    stride: int
    parts: Tensor | None = field(default=None, compare=False)

    @classmethod
    def of(cls, slot: Slot) -> Walk:
        """The walk through the local part of a parameter.

        Raises:
            ConfigError: its elements are too scattered to be numbered.
        """
        layout = slot.layout
        grid, piece = layout.local_grid, layout.piece
        rows, cols = (grid.rows, grid.cols) if layout.quantized else (1, grid.rows * grid.cols)
        runs = None
        if piece is not None and layout.options.numbers_elements:
            runs = numbered_runs(piece.box, slot.name)
            if runs.count > 1:
                rows, cols = runs.count, runs.length
        first, stride = (runs.first, runs.stride) if runs else (0, cols)
        parts = piece.fragments if piece and layout.options.cuts_blocks else None
        return cls(rows, cols, first, stride if rows > 1 and stride else cols, parts)

    @property
    def is_dense(self) -> bool:
        """Whether rows follow each other in the whole tensor too."""
        return self.stride == self.cols

    def blocks(self, block_size: int) -> int:
        """The number of blocks, or parts of blocks."""
        if self.parts is not None:
            return len(self.parts)
        return self.rows * -(-self.cols // block_size)


def numbered_runs(box: Box, name: str) -> Runs:
    """Where a box lies in the whole tensor.

    Raises:
        ConfigError: it is cut along several dimensions behind the first.
    """
    runs = box.runs()
    if runs is None:
        raise ConfigError(
            f"cannot update {name}: stochastic rounding numbers the elements of a tensor, and this "
            "one is sharded along several dimensions behind the first; set param_rounding and "
            "state_rounding to 'nearest'"
        )
    return runs


class CutScales:
    """The scales of blocks that are cut, of which processes hold parts.

    A pass finds the scale that each part needs (`own`, which kernels write); a block's is the
    greatest of its parts.

    Attributes:
        parts: as `Walk.parts`, tensor by tensor.
        own: float32 [parts, states].
        maxima: each tensor's new scales, state by state, with its number in the bucket.
    """

    def __init__(self, bucket: Bucket, walks: list[Walk]) -> None:
        device, states = bucket.key.device, len(bucket.key.rule.states)
        tables = [walk.parts for walk in walks if walk.parts is not None]
        counts = [_scale_count(slot) for slot in bucket.slots]
        begins = [states * sum(counts[:index]) for index in range(len(counts))]
        self._rows = [len(table) for table in tables]
        self._counts = counts
        self.parts = torch.cat(tables).to(device)
        self.own = torch.zeros(len(self.parts), states, dtype=torch.float32, device=device)
        self._new = torch.zeros(states * sum(counts), dtype=torch.float32, device=device)
        self.maxima = [
            (index, self._new[begin : begin + states * count])
            for index, (begin, count) in enumerate(zip(begins, counts, strict=True))
        ]
        state = torch.arange(states, dtype=torch.int64, device="cpu")
        places = [
            begin + table[:, 2:3] + count * state
            for table, begin, count in zip(tables, begins, counts, strict=True)
        ]
        self._places = torch.cat(places).flatten().to(device)

    def pointers(self) -> list[list[int]]:
        """Of each tensor: its parts, their own scales, the new scales, and the number of these."""
        rows, first = [], 0
        for (_, new), length, count in zip(self.maxima, self._rows, self._counts, strict=True):
            tables = (self.parts[first:], self.own[first:], new)
            rows.append([*(table.data_ptr() for table in tables), count])
            first += length
        return rows

    def gather(self) -> None:
        """From the scales that parts need those of blocks, of which there may be no part here."""
        self._new.zero_().scatter_reduce_(0, self._places, self.own.flatten(), "amax")


def cut_scales(bucket: Bucket, walks: list[Walk]) -> CutScales | None:
    """Room for the scales of a bucket's cut blocks; None if it has none."""
    return CutScales(bucket, walks) if bucket.key.options.cuts_blocks else None


def cut_pointers(cut: CutScales | None, count: int) -> list[list[int]]:
    """`CutScales.pointers` of a bucket's tensors; zeros if no blocks are cut."""
    return [[0, 0, 0, 0] for _ in range(count)] if cut is None else cut.pointers()


def tensor_maxima(bucket: Bucket, scales: Tensor) -> list[tuple[int, Tensor]]:
    """The rows of sharded tensors, by their number, of a table [tensors, states] of new scales."""
    chosen = bucket.slots if bucket.key.options.tensor_wise else []
    return [(n, scales[n]) for n, slot in enumerate(chosen) if slot.layout.piece is not None]


def _scale_count(slot: Slot) -> int:
    """The number of scales that each state has here."""
    assert slot.layout.piece is not None
    return math.prod(slot.layout.piece.scales.box.sizes)
