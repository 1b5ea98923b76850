"""What the CUDA backend needs from whatever compiles and launches its kernels.

On GPUs that is CuPy; the tests run the same CUDA source on CPUs through a driver of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray

# One element of any dtype, also of structured ones.
Argument: TypeAlias = "NDArray[Any]"


class CudaModule(Protocol):
    """A compiled CUDA source on one device; its kernels run with one number of threads."""

    def launch(self, kernel: str, blocks: int, arguments: Sequence[Argument]) -> None:
        """Run a kernel on torch's current stream; only inside the driver's `on` of the device.

        Args:
            kernel: the name of an ``extern "C" __global__`` function.
            blocks: the size of the grid; each block has the module's number of threads.
            arguments: one per parameter, passed by value: arrays of exactly one element, whose
                bytes are laid out as the kernel's parameter is.
        """


class CudaDriver(Protocol):
    """Compiles, loads and launches CUDA kernels. Devices are given with their index."""

    def module(self, source: str, name: str, threads: int, device: torch.device) -> CudaModule:
        """Compile a source, or find it in the cache, and load it on a device.

        Args:
            source: complete CUDA C++ text without includes.
            name: what it is, for messages.
            threads: threads of each block that its kernels run with.
            device: where it will run.

        Raises:
            KernelCompileError: the compiler refused the source.
            BackendError: nothing can be compiled or loaded on this machine.
        """

    def on(self, device: torch.device) -> AbstractContextManager[None]:
        """A context in which everything runs on this device and torch's current stream of it."""

    def resident_blocks(self, device: torch.device) -> int:
        """How many blocks a persistent grid has: two per multiprocessor."""

    def capturing(self, device: torch.device) -> bool:
        """Whether torch's current stream of this device is being captured into a CUDA graph."""
