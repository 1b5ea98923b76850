"""The tables that the CUDA kernels read for one bucket, as kernels/cuda/update.cu declares them.

What stays the same while a bucket's tensors do is copied to the device once. What changes from step
to step (pointers that moved, scalars) travels as arguments of a small kernel: no host memory has to
outlive the call, nothing waits, and a CUDA graph that is being captured records it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from optfactory.backends.cuda.driver import CudaModule
from optfactory.backends.cuda.maps import map_tables
from optfactory.backends.held import state_pointers
from optfactory.backends.walk import Walk, cut_pointers, cut_scales, tensor_maxima
from optfactory.rules.codegen import CUDA_THREADS
from optfactory.state.specs import HISTORY_KEY
from optfactory.step.buckets import Bucket
from optfactory.step.slots import Slot

# Elements of one thread, and of a block where no scales are shared; as in kernels/cuda/codec.cuh.
_VECTOR = {True: 8, False: 4}
UNQUANTIZED_BLOCK = 256

# A large tensor's chunks are longer, up to this many rounds of a block of threads: that saves table
# and set-up, while there are still chunks enough for every multiprocessor. It depends on the tensor
# alone, so that norms are summed in the same order whatever else is in the bucket.
_MAX_ROUNDS = 16
_ELEMENTS_PER_ROUND = 2**22

_WORDS = 496  # as in kernels/cuda/write_tables.cu
_WORDS_DTYPE = np.dtype([("values", np.int64, (_WORDS,))])

# Columns of the table of what may change: pointers, views and row of scalars of each tensor.
P, G, P_VIEW, G_VIEW, SCALAR_ROW = range(5)


def word(value: int) -> np.ndarray:
    """A kernel argument of 8 bytes."""
    return np.array([value], dtype=np.int64)


def upload(table: Tensor, device: torch.device) -> Tensor:
    """A table on the device; the copy is ordered on the current stream and does not wait."""
    if device.type == "cuda":
        return table.pin_memory().to(device, non_blocking=True)
    return table.to(device)


@dataclass(frozen=True)
class ChunkRange:
    """The chunks of one tensor.

    Attributes:
        blocks, per_chunk: blocks of the tensor, and of each of its chunks but the last.
        rows, cols: how the kernels walk the tensor; several rows only if they end in short blocks,
            or do not follow each other in the whole tensor.
        walk: the walk through all rows.
    """

    block_size: int
    blocks: int
    per_chunk: int
    rows: int
    cols: int
    walk: Walk

    @classmethod
    def of(cls, slot: Slot, block_size: int, quantized: bool) -> ChunkRange:
        """How a parameter is cut into chunks."""
        walk = Walk.of(slot)
        rows, cols = walk.rows, walk.cols
        numel = rows * cols
        if walk.is_dense and (not quantized or cols % block_size == 0):
            rows, cols = 1, numel  # all blocks but the last are whole: no need to find rows
        round_blocks = CUDA_THREADS * _VECTOR[quantized] // block_size
        rounds = min(max(numel // _ELEMENTS_PER_ROUND, 1), _MAX_ROUNDS)
        blocks = rows * -(-cols // block_size) if walk.parts is None else len(walk.parts)
        return cls(block_size, blocks, round_blocks * rounds, rows, cols, walk)

    @property
    def count(self) -> int:
        """The number of chunks."""
        return -(-self.blocks // self.per_chunk)

    def first_element(self, block: int) -> int:
        """Where a block begins, in row-major order; the tensor's end behind the last block."""
        if self.walk.parts is not None:
            ahead = self.walk.parts[block:, 0]
            return int(ahead[0]) if len(ahead) else self.rows * self.cols
        per_row = -(-self.cols // self.block_size)
        row, in_row = divmod(block, per_row)
        return min(row * self.cols + in_row * self.block_size, self.rows * self.cols)


def chunk_table(ranges: Sequence[ChunkRange], order: Sequence[int]) -> Tensor:
    """All chunks of tensors that are numbered in this order.

    Returns:
        int32 rows [tensor, index of its state pointers (`tensor` too), first block, blocks].
    """
    chosen = [ranges[index] for index in order]
    facts = [[item.blocks, item.per_chunk, item.count] for item in chosen]
    kind: dict[str, Any] = {"dtype": torch.int64, "device": "cpu"}
    blocks, per_chunk, counts = torch.tensor(facts, **kind).view(-1, 3).unbind(1)
    owner = torch.repeat_interleave(counts)
    first = torch.arange(len(owner), **kind) - (counts.cumsum(0) - counts)[owner]
    first *= per_chunk[owner]
    tensor = torch.tensor(order, **kind)[owner]
    length = torch.minimum(blocks[owner] - first, per_chunk[owner])
    return torch.stack((tensor, tensor, first, length), dim=1).to(torch.int32)


class LiveTable:
    """Pointers and scalars of a bucket's tensors on the device, refreshed where they changed."""

    def __init__(self, count: int, device: torch.device, writer: CudaModule) -> None:
        self.columns = torch.zeros(5, count, dtype=torch.int64, device=device)
        self.scalars = torch.empty(0, dtype=torch.float32, device=device)
        self.writer = writer
        self._written: list[list[int]] = [[], [], [], [], []]
        self._views: list[Tensor] = []
        self._strides: Any = None  # those that the views describe

    def refresh(self, bucket: Bucket) -> None:
        """Note where this step's parameters and gradients are."""
        parameters = bucket.parameters
        self._write_column(P, bucket.parameter_addresses)
        self._write_column(G, bucket.gradient_addresses)
        if bucket.strides is not None and bucket.strides is self._strides:
            return
        self._strides = bucket.strides
        contiguous = all(map(Tensor.is_contiguous, chain(parameters, bucket.gradients)))
        if self._views or not contiguous:
            self._views = []
            self._write_column(P_VIEW, [self._view(p) for p in parameters])
            self._write_column(G_VIEW, [self._view(g) for g in bucket.gradients])

    def set_scalars(self, rows: Sequence[Sequence[float]], indices: list[int]) -> None:
        """Scalars that the host computed: distinct rows, and the row of each tensor."""
        values = np.asarray(rows, dtype=np.float32).ravel()
        padded = np.zeros(len(values) + len(values) % 2, dtype=np.float32)
        padded[: len(values)] = values
        if len(self.scalars) != len(padded):
            self.scalars = torch.empty(len(padded), dtype=torch.float32, device=self.columns.device)
        self._write(self.scalars.data_ptr(), padded.view(np.int64))
        self._write_column(SCALAR_ROW, indices)

    def set_device_scalars(self, table: Tensor) -> None:
        """Scalars that the device computed: one row for each tensor."""
        self.scalars = table
        self._write_column(SCALAR_ROW, list(range(len(table))))

    def _view(self, tensor: Tensor) -> int:
        """Describe a tensor that is not row-major contiguous, so that no copy is needed."""
        if tensor.is_contiguous():
            return 0
        facts = torch.empty(1 + 2 * tensor.dim(), dtype=torch.int64, device=self.columns.device)
        values = [tensor.dim(), *tensor.shape, *tensor.stride()]
        self._write(facts.data_ptr(), np.array(values, dtype=np.int64))
        self._views.append(facts)
        return facts.data_ptr()

    def _write_column(self, column: int, values: list[int]) -> None:
        if values != self._written[column]:
            self._write(self.columns[column].data_ptr(), np.array(values, dtype=np.int64))
            self._written[column] = values

    def _write(self, address: int, words: np.ndarray) -> None:
        for first in range(0, len(words), _WORDS):
            part = words[first : first + _WORDS]
            argument = np.zeros(1, dtype=_WORDS_DTYPE)
            argument["values"][0, : len(part)] = part
            self.writer.launch(
                "optfactory_write", 1, [word(address + 8 * first), word(len(part)), argument]
            )


class StaticTables:
    """Shapes, state pointers and chunks of a bucket on the device, and room for its norms.

    Args:
        ranges: each tensor's chunks.
        order: the tensors in the order in which their chunks are numbered.
        rows: rows of state pointers besides the tensors' own, each with the numbers of the chunks
            that use it.
    """

    def __init__(
        self,
        bucket: Bucket,
        ranges: list[ChunkRange],
        order: list[int],
        rows: list[tuple[range, list[int]]],
    ) -> None:
        device = bucket.key.device
        first_chunk = [0] * len(ranges)
        self.chunk_count = 0
        for index in order:
            first_chunk[index] = self.chunk_count
            self.chunk_count += ranges[index].count
        states = len(bucket.key.rule.states)
        chunks = chunk_table(ranges, order)
        for number, (used_by, _) in enumerate(rows, start=len(ranges)):
            chunks[used_by.start : used_by.stop, 1] = number
        pointers = [state_pointers(slot) for slot in bucket.slots] + [row for _, row in rows]
        self.cut = cut_scales(bucket, [item.walk for item in ranges])
        cut = cut_pointers(self.cut, len(ranges))
        tensors = [
            [
                *(item.rows, item.cols, first, item.count, slot.number, *_extra_pointers(slot)),
                *(item.walk.element, item.walk.stride, math.prod(slot.layout.shape), *pieces),
            ]
            for slot, item, first, pieces in zip(
                bucket.slots, ranges, first_chunk, cut, strict=True
            )
        ]
        self.tensors = upload(torch.tensor(tensors, dtype=torch.int64, device="cpu"), device)
        self.states = upload(torch.tensor(pointers, dtype=torch.int64, device="cpu"), device)
        self.chunks = upload(chunks, device)
        options, sums = bucket.key.options, max([*bucket.key.sums.values(), 0])
        chunks_with_sums = self.chunk_count if sums else 0
        wide: dict[str, Any] = {"dtype": torch.float64, "device": device}
        self.partial_sums = torch.zeros(chunks_with_sums, sums, **wide)
        scales = self.chunk_count if options.tensor_wise else 0
        self.partial_scales = torch.zeros(scales, states, dtype=torch.int32, device=device)
        count = len(ranges)
        kind: dict[str, Any] = {"dtype": torch.float32, "device": device}
        self.sums = torch.zeros(count if sums else 0, sums, **wide)
        self.ratios = torch.ones(count if sums else 0, **kind)
        self.factors = torch.ones(count if options.clips else 0, **kind)
        self.scales = torch.zeros(count if options.tensor_wise else 0, states, **kind)
        self.maxima = self.cut.maxima if self.cut else tensor_maxima(bucket, self.scales)
        self.maps = map_tables(device, options.map_kind, options.random_codes)


def _extra_pointers(slot: Slot) -> list[int]:
    """What is kept beside the parameter, and the history of its gradient's norms; 0 without."""
    found = [slot.state.get(key) for key in (slot.layout.kept_key, HISTORY_KEY)]
    return [_pointer(tensor) for tensor in found]


def bucket_argument(
    bucket: Bucket, static: StaticTables, live: LiveTable, chunks: range
) -> np.ndarray:
    """The struct Bucket that a kernel takes by value, for a part of the chunks."""
    columns = [live.columns[column].data_ptr() for column in range(5)]
    fields = [
        static.tensors.data_ptr(),
        static.states.data_ptr(),
        static.chunks.data_ptr(),
        chunks.start,
        chunks.stop,
        *columns,
        live.scalars.data_ptr(),
        static.partial_sums.data_ptr(),
        static.partial_scales.data_ptr(),
        static.sums.data_ptr(),
        static.ratios.data_ptr(),
        static.factors.data_ptr(),
        static.scales.data_ptr(),
        len(bucket.slots),
        _pointer(bucket.grad_scale),
        _pointer(bucket.found_inf),
        *(table.data_ptr() for table in static.maps),
    ]
    argument = np.zeros(1, dtype=np.dtype([("fields", np.int64, (len(fields),))]))
    argument["fields"][0] = fields
    return argument


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
