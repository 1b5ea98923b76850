"""Managed memory as tensors: its shape, what CUDA is told about it, and when it goes."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from optfactory.memory import cupy
from optfactory.memory.managed import concurrent_managed_access, managed_tensor, prefetch
from tests.unit.fake_cupy import FakeCupy, ManagedMemory

DEVICE = torch.device("cuda", 1)
PREFERRED_LOCATION, ACCESSED_BY = 3, 5


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCupy]:
    for cached in (cupy.load_cupy, concurrent_managed_access):
        cached.cache_clear()
    machine = FakeCupy()
    machine.install(monkeypatch)
    yield machine
    for cached in (cupy.load_cupy, concurrent_managed_access):
        cached.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_the_tensor_lies_in_managed_memory_of_the_device(
    fake: FakeCupy, dtype: torch.dtype
) -> None:
    tensor = managed_tensor((3, 5), dtype, DEVICE)
    assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == ((3, 5), dtype, True)
    nbytes = 15 * dtype.itemsize
    assert fake.of("malloc") == [(nbytes,)]
    kinds = [event[0] for event in fake.events]
    assert (
        kinds.index("enter cupy device") < kinds.index("malloc") < kinds.index("exit cupy device")
    )
    assert fake.of("enter torch device") == [(DEVICE,)]
    assert fake.of("advise") == [
        (tensor.data_ptr(), nbytes, PREFERRED_LOCATION, 1),
        (tensor.data_ptr(), nbytes, ACCESSED_BY, 1),
    ]
    tensor.fill_(7)
    assert (tensor == 7).all()


def test_an_empty_tensor_takes_no_memory(fake: FakeCupy, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda shape, dtype, device: empty(shape, dtype=dtype))
    tensor = managed_tensor((0, 5), torch.float32, DEVICE)
    assert (tensor.shape, tensor.dtype) == ((0, 5), torch.float32)
    prefetch(tensor, DEVICE)
    assert not fake.of("malloc")
    assert not fake.of("prefetch")


def test_the_memory_goes_with_the_last_view(
    fake: FakeCupy, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Any]] = []

    class Watched(ManagedMemory):
        def __init__(self, nbytes: int) -> None:
            super().__init__(nbytes)
            made.append(weakref.ref(self))

    monkeypatch.setattr("tests.unit.fake_cupy.ManagedMemory", Watched)
    tensor = managed_tensor((4, 4), torch.float32, DEVICE)
    view = tensor[1:]
    del tensor
    gc.collect()
    assert made[0]() is not None
    del view
    gc.collect()
    assert made[0]() is None


def test_pages_are_prefetched_on_torchs_stream(fake: FakeCupy) -> None:
    fake.stream = 4711
    tensor = managed_tensor((8,), torch.float32, DEVICE)
    prefetch(tensor[2:], DEVICE)
    assert fake.of("prefetch") == [(tensor.data_ptr() + 8, 24, 1, 4711)]


def test_where_pages_do_not_move_nothing_is_advised_or_prefetched(fake: FakeCupy) -> None:
    fake.concurrent = 0
    assert not concurrent_managed_access(DEVICE)
    prefetch(managed_tensor((8,), torch.float32, DEVICE), DEVICE)
    assert fake.of("malloc") == [(32,)]
    assert not fake.of("advise")
    assert not fake.of("prefetch")


def test_memory_that_torch_copied_is_not_taken_for_managed(
    fake: FakeCupy, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = torch.as_tensor
    monkeypatch.setattr(torch, "as_tensor", lambda *given, **named: real(*given, **named).clone())
    with pytest.raises(AssertionError, match="copied"):
        managed_tensor((8,), torch.float32, DEVICE)
