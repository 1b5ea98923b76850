"""The CUDA backend: one launch per bucket and pass, on torch's current stream."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from optfactory.backends.base import LAST_STEP, WARM_UP, Findings, steps_problem
from optfactory.backends.cuda.driver import CudaDriver, CudaModule
from optfactory.backends.cuda.paging import conveyors
from optfactory.backends.cuda.tables import (
    UNQUANTIZED_BLOCK,
    ChunkRange,
    LiveTable,
    StaticTables,
    bucket_argument,
    upload,
    word,
)
from optfactory.backends.held import HeldStates
from optfactory.errors import BackendError
from optfactory.memory import placement
from optfactory.rules.codegen import (
    CUDA_THREADS,
    KernelVariant,
    cuda_source,
    cuda_tables_source,
    dtype_name,
)
from optfactory.rules.options import has_scales
from optfactory.rules.passes import Stage
from optfactory.step.buckets import Bucket, BucketKey


class CudaBackend:
    """Compiles a kernel per rule, dtypes and width at first use, and launches it on whole buckets.

    Args:
        driver: compiles and launches; CuPy on GPUs.
    """

    name = "cuda"
    supports_capture = True
    divides_gradients = True

    def __init__(self, driver: CudaDriver) -> None:
        self._driver = driver
        self._modules: dict[tuple[KernelVariant | None, torch.device], CudaModule] = {}

    def capturing(self, device: torch.device) -> bool:
        return self._driver.capturing(device)

    def prepare(self, buckets: Sequence[Bucket]) -> None:
        for bucket in buckets:
            if bucket.tables is not None and bucket.tables.states.are_those_of(bucket):
                bucket.tables.check_steps(bucket)
                continue
            device = bucket.key.device
            if self._driver.capturing(device):
                raise BackendError(WARM_UP)
            with self._driver.on(device):
                kernels = self._module(_variant(bucket.key), device)
                writer = self._module(None, device)
                bucket.tables = _Tables(bucket, self._driver, kernels, writer)
            bucket.tables.check_steps(bucket)

    def update(self, bucket: Bucket) -> Iterator[Findings]:
        passes: Iterator[Findings] = bucket.tables.run(bucket)
        while True:
            # Left at each pause: buckets of other devices may be run meanwhile.
            with self._driver.on(bucket.key.device):
                found = next(passes, None)
            if found is None:
                return
            yield found

    def _module(self, variant: KernelVariant | None, device: torch.device) -> CudaModule:
        """The compiled kernels of a variant; None stands for those that write tables."""
        found = self._modules.get((variant, device))
        if found is None:
            source = cuda_tables_source() if variant is None else cuda_source(variant)
            name = "tables" if variant is None else variant.label
            found = self._driver.module(source, name, CUDA_THREADS, device)
            self._modules[variant, device] = found
        return found


def _variant(key: BucketKey) -> KernelVariant:
    block_size = key.block_size if has_scales(key.formats) else UNQUANTIZED_BLOCK
    return KernelVariant(
        key.rule,
        dtype_name(key.parameter),
        dtype_name(key.gradient),
        key.formats,
        block_size,
        key.options,
    )


class _Tables:
    """What one bucket needs on its device; built once, refreshed at every step."""

    def __init__(
        self, bucket: Bucket, driver: CudaDriver, kernels: CudaModule, writer: CudaModule
    ) -> None:
        device = bucket.key.device
        self.driver, self.kernels, self.writer = driver, kernels, writer
        self.states = HeldStates(bucket)
        ranges = _chunk_ranges(bucket)
        paged = [
            item
            for item in zip(range(len(ranges)), bucket.slots, ranges, strict=True)
            if item[1].layout.where in (placement.PINNED, placement.MANAGED)
        ]
        resident = [index for index in range(len(ranges)) if index not in {i for i, *_ in paged}]
        self.resident = range(sum(ranges[index].count for index in resident))
        self.conveyors = conveyors(paged, self.resident.stop, device)
        order = resident + [i for belt in self.conveyors for i in belt.tensors()]
        rows = [row for belt in self.conveyors for row in belt.pointer_rows()]
        self.static = StaticTables(bucket, ranges, order, rows)
        self.chunks = range(self.static.chunk_count)
        self.live = LiveTable(len(bucket.slots), device, writer)
        self.grid = driver.resident_blocks(device)
        self.device_steps = _device_steps(bucket)
        # torch's operations on thousands of single numbers would take longer than the update.
        self.host_steps = (
            [ctypes.c_double.from_address(slot.state["step"].data_ptr()) for slot in bucket.slots]
            if self.device_steps is None
            else []
        )

    def check_steps(self, bucket: Bucket) -> None:
        """Refuse step counters on the host that are no counts.

        Raises:
            StateError: names their parameters.
        """
        steps = [counter.value for counter in self.host_steps]
        if not all(0 <= step < LAST_STEP for step in steps):
            raise steps_problem(bucket, steps)

    def run(self, bucket: Bucket) -> Iterator[Findings]:
        """Run the passes, and advance the steps before the last."""
        if self.device_steps is None and bucket.must_skip():
            return
        live = self.live
        if self.driver.capturing(bucket.key.device):
            # The graph writes its tables at every replay: it gets its own, for as long as it may
            # be replayed, which is as long as the parameters exist.
            live = LiveTable(len(bucket.slots), bucket.key.device, self.writer)
            weakref.finalize(bucket.slots[0].parameter, id, (self, live))
        live.refresh(bucket)
        steps = self._set_scalars(bucket, live)
        tensors, static = range(len(bucket.slots)), self.static
        stages = bucket.key.sums
        if Stage.GRADIENTS in stages:
            self._launch("optfactory_square_gradients", bucket, live, self.chunks)
            self._launch("optfactory_sum_gradients", bucket, live, tensors)
            yield Findings(Stage.GRADIENTS, static.sums.view(-1, 1)[: len(tensors)], [])
            self._launch("optfactory_clip", bucket, live, tensors)
        if Stage.NORMS in stages:
            self._launch("optfactory_norms", bucket, live, self.chunks)
            self._launch("optfactory_gather", bucket, live, tensors)
            yield Findings(Stage.NORMS, static.sums, [])
            self._launch("optfactory_finalize", bucket, live, tensors)
        if Stage.TENSORS in stages:
            sums = static.sums if stages[Stage.TENSORS] else None
            self._pass("optfactory_statistics", bucket, live, writes=False)
            if sums is not None or bucket.key.options.tensor_wise:
                self._launch("optfactory_gather", bucket, live, tensors)
            if static.cut:
                static.cut.gather()
            yield Findings(Stage.TENSORS, sums, static.maxima)
            if sums is not None:
                self._launch("optfactory_finalize", bucket, live, tensors)
        self._count(bucket, steps)
        self._pass("optfactory_update", bucket, live, writes=True)
        if bucket.key.options.scales_first:
            self._launch("optfactory_commit", bucket, live, tensors)

    def _set_scalars(self, bucket: Bucket, live: LiveTable) -> Tensor | list[float]:
        """Make the scalars of the coming step; returns its number for each tensor."""
        if self.device_steps is not None:
            values = torch.empty(len(bucket.slots), dtype=torch.float64, device=bucket.key.device)
            self._advance(bucket, values, counts=not bucket.key.sums)
            live.set_device_scalars(bucket.device_scalars(values))
            return values
        steps = [counter.value + 1 for counter in self.host_steps]
        live.set_scalars(*bucket.scalar_rows(steps))
        return steps

    def _count(self, bucket: Bucket, steps: Tensor | list[float]) -> None:
        """Advance the counters, where that was not done already."""
        if not isinstance(steps, Tensor):
            for counter, value in zip(self.host_steps, steps, strict=True):
                counter.value = value
        elif bucket.key.sums:  # a step that pauses, for others to complete what it found
            self._advance(bucket, steps, counts=True)

    def _advance(self, bucket: Bucket, values: Tensor, counts: bool) -> None:
        """The numbers of the coming step on the device, float64, and whether it counts now."""
        assert self.device_steps is not None
        found_inf = 0 if bucket.found_inf is None else bucket.found_inf.data_ptr()
        pointers = (self.device_steps.data_ptr(), values.data_ptr())
        arguments = (*pointers, len(values), found_inf, int(counts))
        blocks = -(-len(values) // CUDA_THREADS)
        self.writer.launch("optfactory_advance", blocks, [word(value) for value in arguments])

    def _pass(self, kernel: str, bucket: Bucket, live: LiveTable, writes: bool) -> None:
        """One launch for all state that is in device memory, and one for each piece of the rest."""

        def launch(chunks: range) -> None:
            self._launch(kernel, bucket, live, chunks)

        if self.resident:
            launch(self.resident)
        for belt in self.conveyors:
            belt.run(launch, writes)

    def _launch(self, kernel: str, bucket: Bucket, live: LiveTable, work: range) -> None:
        if not work:
            return
        argument = bucket_argument(bucket, self.static, live, work)
        self.kernels.launch(kernel, min(self.grid, len(work)), [argument])


def _chunk_ranges(bucket: Bucket) -> list[ChunkRange]:
    """How each parameter is cut into chunks, found out once as long as its state stays."""
    block_size = _variant(bucket.key).block_size
    for slot in bucket.slots:
        if slot.held.row is None:
            slot.held.row = ChunkRange.of(slot, block_size, has_scales(bucket.key.formats))
    return [slot.held.row for slot in bucket.slots]


def _device_steps(bucket: Bucket) -> Tensor | None:
    """Pointers to the step counters, if these are on the device."""
    if not bucket.slots[0].layout.device_step:
        return None
    pointers = [slot.state["step"].data_ptr() for slot in bucket.slots]
    return upload(torch.tensor(pointers, dtype=torch.int64, device="cpu"), bucket.key.device)
