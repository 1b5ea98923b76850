"""CUDA managed memory as torch tensors: pages that the system moves to the host when GPUs are full.

Managed memory needs no copy of its own: a kernel uses the same address wherever a page lies.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from optfactory.memory.cupy import load_cupy


def managed_tensor(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A contiguous, uninitialized tensor in managed memory of a device.

    The memory is freed with the last tensor that views it; freeing waits for the device, so that
    no kernel loses memory that it still works on.

    Raises:
        BackendError: CuPy is missing or does not fit.
        RuntimeError: neither the host nor the device has room (CuPy's CUDARuntimeError).
    """
    cupy = load_cupy()
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes == 0:
        return torch.empty(shape, dtype=dtype, device=device)
    with torch.cuda.device(device), cupy.cuda.Device(device.index):
        memory = cupy.cuda.malloc_managed(nbytes)
        if concurrent_managed_access(device):
            _advise(cupy.cuda.runtime, memory.ptr, nbytes, device)
        tensor = torch.as_tensor(_Exposed(memory, nbytes), dtype=torch.uint8, device=device)
    # A copy would be an ordinary tensor that cannot be evicted.
    assert tensor.data_ptr() == memory.ptr, "torch copied the managed memory"
    return tensor.view(dtype).view(shape)


def prefetch(tensor: Tensor, device: torch.device) -> None:
    """Bring the pages of a managed tensor to the device, on torch's current stream of it.

    Does nothing where pages do not move on demand (Windows, WSL): there, they are on the device
    whenever a kernel runs.
    """
    nbytes = tensor.numel() * tensor.element_size()
    if nbytes == 0 or not concurrent_managed_access(device):
        return
    cupy = load_cupy()
    stream = torch.cuda.current_stream(device).cuda_stream
    with torch.cuda.device(device), cupy.cuda.Device(device.index):
        cupy.cuda.runtime.memPrefetchAsync(tensor.data_ptr(), nbytes, device.index, stream)


@cache
def concurrent_managed_access(device: torch.device) -> bool:
    """Whether pages move on demand, so that managed memory may exceed the device's.

    Raises:
        BackendError: CuPy is missing or does not fit.
    """
    runtime = load_cupy().cuda.runtime
    attribute = runtime.cudaDevAttrConcurrentManagedAccess
    return bool(runtime.deviceGetAttribute(attribute, device.index))


def _advise(runtime: Any, address: int, nbytes: int, device: torch.device) -> None:
    """Tell the driver how optimizer state is used: read and written by one device, every step.

    Preferred location: pages are made on the device and go back there when prefetched or touched;
    without it, the driver may settle pages that came and went a few times on the host.
    Accessed by: pages that had to leave for lack of room stay mapped, so a kernel reads and
    writes them over the bus instead of stopping at each for a page fault, whose migration
    would evict another page that the same sweep needs. Not read-mostly: each write would have
    to discard the copies which that makes.
    """
    for advice in (runtime.cudaMemAdviseSetPreferredLocation, runtime.cudaMemAdviseSetAccessedBy):
        runtime.memAdvise(address, nbytes, advice, device.index)


class _Exposed:
    """Managed memory in the CUDA array interface; torch keeps it alive as long as its tensors."""

    def __init__(self, memory: Any, nbytes: int) -> None:
        self._memory = memory
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (memory.ptr, False),
            "version": 3,
        }
