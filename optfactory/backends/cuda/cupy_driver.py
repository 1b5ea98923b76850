"""Loads and launches CUDA kernels through CuPy, on torch's devices, streams and memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from optfactory.backends.cuda.driver import Argument
from optfactory.backends.cuda.nvrtc import architecture_of, cubin_file, nvrtc_version
from optfactory.errors import BackendError
from optfactory.memory.cupy import PORTABLE, load_cupy

_LEGACY_STREAM = 1  # cudaStreamLegacy: always the stream that torch uses by default


@cache
def cupy_driver() -> CupyDriver:
    """The driver of this process.

    Raises:
        BackendError: CuPy or NVRTC is missing or does not fit torch or the NVIDIA driver.
    """
    cupy = load_cupy()
    nvrtc_version()
    return CupyDriver(cupy)


class CupyModule:
    """A source's machine code on one device."""

    def __init__(self, module: Any, threads: int) -> None:
        self._module = module
        self._block = (threads,)
        self._kernels: dict[str, Any] = {}

    def launch(self, kernel: str, blocks: int, arguments: Sequence[Argument]) -> None:
        function = self._kernels.get(kernel)
        if function is None:
            function = self._kernels[kernel] = self._module.get_function(kernel)
        # CuPy hands the address of a NumPy array's one element to cuLaunchKernel, which copies
        # as many bytes as the kernel's parameter has before it returns.
        function((blocks,), self._block, tuple(arguments))


class CupyDriver:
    """Implements `CudaDriver`; made by `cupy_driver`."""

    def __init__(self, cupy: Any) -> None:
        self._cupy = cupy
        self._lock = threading.Lock()
        self._modules: dict[tuple[str, int, int], CupyModule] = {}
        self._streams: dict[int, Any] = {}

    def module(self, source: str, name: str, threads: int, device: torch.device) -> CupyModule:
        key = (source, threads, device.index)
        with self._lock:
            module = self._modules.get(key)
            if module is None:
                module = CupyModule(self._load(source, name, device), threads)
                self._modules[key] = module
        return module

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        # torch and CuPy keep their own notion of the current device where a thread has no
        # context yet, hence both guards.
        with torch.cuda.device(device), self._cupy.cuda.Device(device.index), self._stream(device):
            yield

    def resident_blocks(self, device: torch.device) -> int:
        return 2 * _multiprocessors(device)

    def capturing(self, device: torch.device) -> bool:
        with torch.cuda.device(device):
            return torch.cuda.is_current_stream_capturing()

    def _stream(self, device: torch.device) -> Any:
        """CuPy's view of torch's current stream."""
        # 0 is the default stream, which CuPy may be told to take for another one per thread.
        pointer = torch.cuda.current_stream(device).cuda_stream or _LEGACY_STREAM
        stream = self._streams.get(pointer)
        if stream is None:
            stream = self._cupy.cuda.Stream.from_external(_Stream(pointer))
            self._streams[pointer] = stream
        return stream

    def _load(self, source: str, name: str, device: torch.device) -> Any:
        architecture = architecture_of(device)
        path = cubin_file(source, name, architecture)
        failure = self._cupy.cuda.driver.CUDADriverError
        with self.on(device):
            try:
                return self._load_file(path)
            except failure:
                # A damaged file in the cache (a full disk, a copied folder): build it anew, once.
                path.unlink(missing_ok=True)
            path = cubin_file(source, name, architecture)
            try:
                return self._load_file(path)
            except failure as error:
                raise BackendError(
                    f"the kernel {path} was compiled for {architecture} but cannot be loaded: "
                    f"{error}; update the NVIDIA driver, {PORTABLE}"
                ) from error

    def _load_file(self, path: Path) -> Any:
        module = self._cupy.RawModule(path=str(path))
        module.compile()  # loads it now, so that what fails, fails before the first step
        return module


class _Stream:
    """A stream of torch's in the CUDA stream protocol, which not every torch implements."""

    def __init__(self, pointer: int) -> None:
        self._pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._pointer


@cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
