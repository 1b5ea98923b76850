"""The tables that native kernels read for one bucket, laid out as kernels/cpu/tables.h says."""

from __future__ import annotations

import ctypes
import math
import os
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from optfactory.backends.base import Findings, steps_problem
from optfactory.backends.held import Held, HeldStates, state_pointers
from optfactory.backends.walk import Walk, cut_scales, tensor_maxima
from optfactory.rules.options import KernelOptions
from optfactory.rules.passes import Stage
from optfactory.state.positions import positions_of
from optfactory.state.quantmap import QuantizationMap, map_for
from optfactory.state.specs import HISTORY_KEY
from optfactory.step.buckets import Bucket
from optfactory.step.slots import Slot

# Elements of one unit of work: small enough to balance threads, large enough to hide the loop.
_CHUNK_NUMEL = 65_536

# Columns of a Tensor row in kernels/cpu/update.cpp; its states' pointers and scales follow.
_P, _G, _P_VIEW, _G_VIEW, _ROWS, _COLS, _SCALARS, _FIRST_CHUNK, _CHUNKS = range(9)
_NUMBER, _KEPT, _HISTORY, _ELEMENT, _STRIDE, _ELEMENTS, _PARTS = range(9, 16)
_PART_COLUMNS = 4

# Fields of Bucket in kernels/cpu/tables.h before the maps.
_BUCKET_SCALARS, _THREADS, _BUCKET_FIELDS = 2, 11, 12


# In the place of a map, for states that have none.
_NO_MAP = (None,) * 4


@cache
def _map_tables(signed: bool, options: KernelOptions) -> tuple[Tensor, ...]:
    """A map as kernels read it: its values, the values' bytes in planes, all keys, and lines.

    Keys are seen from their middle on: kernels index them with signed numbers.
    """
    qmap = map_for(signed, options.map_kind)
    values = torch.tensor(qmap.values, dtype=torch.float32, device="cpu")
    planes = values.view(torch.uint8).view(256, 4).t().contiguous()
    keys = torch.tensor(qmap.all_keys(options.floors), dtype=torch.int32, device="cpu")
    return values, planes, keys[len(keys) // 2 :], _line_table(qmap, options)


def _line_table(qmap: QuantizationMap, options: KernelOptions) -> Tensor:
    """The lines of a map as the struct `Lines` of kernels/cpu/codec.h; zeros if it has none."""
    rows: list[tuple[float, ...]] = [(0.0,) * 8] * 6
    if qmap.lines is not None and options.random_codes:
        rows = [*qmap.lines.tables()[:2], *positions_of(qmap.lines).tables()]
    elif qmap.lines is not None:
        rows[:4] = qmap.lines.tables()
    return torch.tensor([row * 2 for row in rows], dtype=torch.float32, device="cpu")


# What kernels read: the defaults of a program, which may be others, must not decide.
_FLOATS: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
_WORDS: dict[str, Any] = {"dtype": torch.int64, "device": "cpu"}


class Tables:
    """The tables a kernel reads for one bucket, laid out as kernels/cpu/update.cpp declares them.

    Built once per bucket; a step only refreshes the pointers that moved and the scalars.
    """

    def __init__(self, bucket: Bucket, library: ctypes.CDLL) -> None:
        self.library = library
        self.states = HeldStates(bucket)
        states = len(bucket.key.rule.states)
        count = len(bucket.slots)
        rows = list(map(_row, bucket.slots))
        walks = [row.walk for row in rows]
        self.tensors = _words(row.columns for row in rows)
        self.cut = cut_scales(bucket, walks)
        if self.cut is not None:
            self.tensors[:, _PARTS : _PARTS + _PART_COLUMNS] = torch.tensor(
                self.cut.pointers(), **_WORDS
            )
        self.chunks = self._chunk_table(walks, bucket.key.block_size)
        sums = max([1, *bucket.key.sums.values()])
        self.partial_sums = torch.zeros(len(self.chunks), sums, dtype=torch.float64, device="cpu")
        self.partial_scales = torch.zeros(len(self.chunks), states, **_FLOATS)
        self.sums = torch.zeros(count, sums, dtype=torch.float64, device="cpu")
        self.ratios = torch.ones(count, **_FLOATS)
        self.factors = torch.ones(count, **_FLOATS)
        self.scales = torch.zeros(count, states, **_FLOATS)
        self.maxima = self.cut.maxima if self.cut else tensor_maxima(bucket, self.scales)
        self.steps = (ctypes.c_void_p * count)(
            *(slot.state["step"].data_ptr() for slot in bucket.slots)
        )
        self.step_values = (ctypes.c_double * count)()
        self.scalar_rows = torch.empty(0, **_FLOATS)
        self.scalar_indices: list[int] = []
        self.pointers: tuple[list[int], list[int]] = ([], [])
        self.views: list[Tensor] = []
        self.strides: Any = None  # those that the views describe
        self.bucket = (ctypes.c_int64 * (_BUCKET_FIELDS + 4 * states))()
        self._check_layout(len(bucket.key.rule.all_scalars))
        self._fill_bucket(bucket)

    def check_steps(self, bucket: Bucket) -> None:
        """Refuse step counters that are no counts.

        Raises:
            StateError: names their parameters.
        """
        count = ctypes.c_int64(len(self.steps))
        if not self.library.optfactory_read_steps(self.steps, self.step_values, count):
            raise steps_problem(bucket, list(self.step_values))

    def _check_layout(self, scalars: int) -> None:
        """Both sides of the call must agree on the tables; a mismatch would corrupt memory."""
        python = (self.tensors.shape[1], len(self.bucket), scalars)
        native = tuple(
            getattr(self.library, f"optfactory_{table}_fields")()
            for table in ("tensor", "bucket", "scalar")
        )
        if python != native:
            raise AssertionError(f"table layouts differ: {python} here, {native} in the kernel")

    def _chunk_table(self, walks: list[Walk], block_size: int) -> Tensor:
        """Cut every tensor into chunks of blocks, and note which chunks are whose.

        Returns:
            Rows [tensor, first block, the block behind the last].
        """
        per_chunk = max(1, _CHUNK_NUMEL // block_size)
        blocks = torch.tensor([walk.blocks(block_size) for walk in walks], **_WORDS)
        counts = (blocks + per_chunk - 1) // per_chunk
        begins = counts.cumsum(0) - counts
        self.tensors[:, _FIRST_CHUNK], self.tensors[:, _CHUNKS] = begins, counts
        owner = torch.repeat_interleave(counts)
        first = (torch.arange(len(owner), **_WORDS) - begins[owner]) * per_chunk
        end = torch.minimum(first + per_chunk, blocks[owner])
        return torch.stack((owner, first, end), dim=1)

    def _fill_bucket(self, bucket: Bucket) -> None:
        states, formats = bucket.key.rule.states, bucket.key.formats
        maps = [
            _map_tables(state.signed, bucket.key.options) if name == "map8" else _NO_MAP
            for state, name in zip(states, formats, strict=True)
        ]
        self.bucket[:] = [
            self.tensors.data_ptr(),
            self.chunks.data_ptr(),
            0,  # scalars: set at each step
            self.partial_sums.data_ptr(),
            self.partial_scales.data_ptr(),
            self.sums.data_ptr(),
            self.ratios.data_ptr(),
            self.factors.data_ptr(),
            self.scales.data_ptr(),
            len(bucket.slots),
            len(self.chunks),
            1,  # threads: set at each step
            *(table.data_ptr() if table is not None else 0 for tables in maps for table in tables),
        ]

    def run(self, bucket: Bucket) -> Iterator[Findings]:
        """Run the passes, and advance the steps before the last."""
        if bucket.must_skip():
            return
        self._refresh_pointers(bucket)
        count = ctypes.c_int64(len(bucket.slots))
        self.library.optfactory_next_steps(self.steps, self.step_values, count)
        rows, indices = bucket.scalar_rows(list(self.step_values))
        self.scalar_rows = torch.tensor(rows, dtype=torch.float32, device="cpu")
        if indices != self.scalar_indices:
            self.tensors[:, _SCALARS] = torch.tensor(indices, **_WORDS)
            self.scalar_indices = indices
        self.bucket[_BUCKET_SCALARS] = self.scalar_rows.data_ptr()
        self.bucket[_THREADS] = max(1, min(_thread_count(), len(self.chunks)))
        stages = bucket.key.sums
        if Stage.GRADIENTS in stages:
            self.library.optfactory_square_gradients(self.bucket)
            yield Findings(Stage.GRADIENTS, self.sums.view(-1, 1)[: len(bucket.slots)], [])
            self.library.optfactory_clip(self.bucket)
        if Stage.NORMS in stages:
            self.library.optfactory_norms(self.bucket)
            yield Findings(Stage.NORMS, self.sums, [])
            self.library.optfactory_finalize(self.bucket)
        if Stage.TENSORS in stages:
            self.library.optfactory_statistics(self.bucket)
            if self.cut:
                self.cut.gather()
            yield Findings(Stage.TENSORS, self.sums if stages[Stage.TENSORS] else None, self.maxima)
            if stages[Stage.TENSORS]:
                self.library.optfactory_finalize(self.bucket)
        self.library.optfactory_advance(self.steps, self.step_values, count)
        self.library.optfactory_update(self.bucket)

    def _refresh_pointers(self, bucket: Bucket) -> None:
        pointers = (bucket.parameter_addresses, bucket.gradient_addresses)
        if pointers != self.pointers:
            self.tensors[:, _P] = torch.tensor(pointers[0], **_WORDS)
            self.tensors[:, _G] = torch.tensor(pointers[1], **_WORDS)
            self.pointers = pointers
        if bucket.strides is None or bucket.strides is not self.strides:
            self._refresh_views(bucket.parameters, bucket.gradients)
            self.strides = bucket.strides

    def _refresh_views(self, parameters: list[Tensor], gradients: list[Tensor]) -> None:
        """Describe the tensors that are not row-major contiguous, so that no copy is needed."""
        if not self.views and all(map(Tensor.is_contiguous, chain(parameters, gradients))):
            return
        self.views = []
        for column, tensors in ((_P_VIEW, parameters), (_G_VIEW, gradients)):
            self.tensors[:, column] = torch.tensor([self._view(t) for t in tensors], **_WORDS)

    def _view(self, tensor: Tensor) -> int:
        if tensor.is_contiguous():
            return 0
        self.views.append(torch.tensor([tensor.dim(), *tensor.shape, *tensor.stride()], **_WORDS))
        return self.views[-1].data_ptr()


# OpenMP's threads do not exist in a forked process, and GNU's runtime would wait for them for ever.
_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def _thread_count() -> int:
    return 1 if _forked else torch.get_num_threads()


@dataclass(frozen=True)
class _Row:
    """One parameter's row of the table of tensors, of what stays while its state stays."""

    walk: Walk
    columns: bytes

    @classmethod
    def of(cls, slot: Slot) -> _Row:
        walk = Walk.of(slot)
        row = [0] * (_PARTS + _PART_COLUMNS)
        row[_ROWS], row[_COLS] = walk.rows, walk.cols
        row[_ELEMENT], row[_STRIDE] = walk.element, walk.stride
        row[_NUMBER], row[_ELEMENTS] = slot.number, math.prod(slot.layout.shape)
        for column, key in ((_KEPT, slot.layout.kept_key), (_HISTORY, HISTORY_KEY)):
            row[column] = slot.state[key].data_ptr() if key in slot.state else 0
        row += state_pointers(slot)
        return cls(walk, array("q", row).tobytes())


def _row(slot: Slot) -> _Row:
    held: Held = slot.held
    if held.row is None:
        held.row = _Row.of(slot)
    row: _Row = held.row
    return row


def _words(rows: Iterable[bytes]) -> Tensor:
    """A table of int64 from the bytes of its rows."""
    whole = list(rows)
    return torch.frombuffer(bytearray().join(whole), dtype=torch.int64).view(len(whole), -1)
