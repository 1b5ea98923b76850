"""Paged state of CPU parameters as if they were on a GPU, for the tests of its way there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from optfactory import Optimizer2State
from optfactory.backends.cuda import paging as cuda_paging
from optfactory.memory import placement
from tests.emulation.guarded import Guarded

PAGED_MIN_NUMEL = 3000
PIECE_BYTES = 2**16


class Pages:
    """What the package asked of CUDA, which is not there.

    Args:
        where: the kinds of paged state; of several, a tensor's size decides.

    Attributes:
        prefetched: first byte and length of all pages that were asked for.
        managed: sizes of the managed tensors.
        waits: how often the host waited for the device.
        guarded: the memory around the buffers that pinned state passes through.
    """

    def __init__(self, patch: pytest.MonkeyPatch, *where: str) -> None:
        self.prefetched: list[tuple[int, int]] = []
        self.managed: list[int] = []
        self.waits = 0
        self.guarded = Guarded()
        self._pretend_devices(patch, where)
        patch.setattr(cuda_paging, "PIECE_BYTES", PIECE_BYTES)
        patch.setattr(cuda_paging, "prefetch", self._prefetch)
        patch.setattr(cuda_paging, "torch", _TorchWithGuards(self.guarded))
        patch.setattr(placement, "managed_tensor", self._managed_tensor)
        patch.setattr(torch.cuda, "synchronize", self._synchronize)

    def _pretend_devices(self, patch: pytest.MonkeyPatch, where: tuple[str, ...]) -> None:
        place_for = placement.place_for

        def on_gpu(numel: int, device: torch.device, is_paged: bool, _: str) -> tuple[str, str]:
            chosen = where[numel % len(where)]
            return place_for(numel, torch.device("cuda", 0), is_paged, chosen)

        patch.setattr(placement, "PAGED_MIN_NUMEL", PAGED_MIN_NUMEL)
        patch.setattr(placement, "place_for", on_gpu)

    def _prefetch(self, tensor: Tensor, device: torch.device) -> None:
        self.prefetched.append((tensor.data_ptr(), tensor.numel() * tensor.element_size()))

    def _managed_tensor(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        self.managed.append(torch.Size(shape).numel() * dtype.itemsize)
        return torch.empty(shape, dtype=dtype)

    def _synchronize(self, device: torch.device) -> None:
        self.waits += 1


class _TorchWithGuards:
    """The module torch, but for guards around new memory."""

    def __init__(self, guarded: Guarded) -> None:
        self._guarded = guarded

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self._guarded.empty("buffer", (numel,), dtype)


def belts(optimizer: Optimizer2State) -> list[cuda_paging.Conveyor]:
    """The conveyors of all buckets, after a step."""
    buckets = optimizer._current_plan().gather()
    return [belt for bucket in buckets for belt in bucket.tables.conveyors]


# ---- streams ---------------------------------------------------------------------------------


class _Task:
    def __init__(self, lane: int, work: Callable[[], None], after: Sequence[Any]) -> None:
        self.lane, self.work, self.done = lane, work, False
        self._after = [task for task in after if task is not None]

    def is_ready(self) -> bool:
        return all(task.done for task in self._after)


class _Lane:
    def __init__(self, streams: ShuffledStreams, number: int) -> None:
        self._streams, self._number = streams, number
        self._last: _Task | None = None

    def do(self, work: Callable[[], None], after: _Task | None) -> _Task:
        waits = [self._last, after if self._streams.heeds_events else None]
        self._last = _Task(self._number, work, waits)
        self._streams.tasks.append(self._last)
        return self._last


class ShuffledStreams:
    """Three streams of which each does its work as early or as late as events allow.

    Args:
        random: decides which stream goes first.
        heeds_events: false makes streams not wait for each other.
    """

    def __init__(self, random: Random, heeds_events: bool = True) -> None:
        self.tasks: list[_Task] = []
        self.heeds_events = heeds_events
        self._random = random

    def begin(self) -> tuple[_Lane, _Lane, _Lane]:
        """Empty streams."""
        first, second, third = (_Lane(self, number) for number in range(3))
        return first, second, third

    def end(self, here: _Lane) -> None:
        """Do all the work."""
        haste = [self._random.random() for _ in range(3)]
        while self.tasks:
            ready = [task for task in self.tasks if task.is_ready()]
            chosen = max(ready, key=lambda task: haste[task.lane] + 0.5 * self._random.random())
            self.tasks.remove(chosen)
            chosen.work()
            chosen.done = True
