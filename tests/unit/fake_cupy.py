"""A stand-in for CuPy, torch's CUDA functions and NVRTC that notes what is asked of them."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch


class CUDARuntimeError(RuntimeError):
    pass


class CUDADriverError(RuntimeError):
    pass


class NVRTCError(RuntimeError):
    pass


class ManagedMemory:
    def __init__(self, nbytes: int) -> None:
        self.buffer = (ctypes.c_char * nbytes)()
        self.ptr = ctypes.addressof(self.buffer)


class FakeCupy:
    """What the machine has, and a log of the calls.

    Attributes:
        version, runtime, driver: of CuPy, of its CUDA, and what the NVIDIA driver supports.
        nvrtc: its version, or the error that loading it raises.
        broken: numbers of the module loads that fail, counted from 0.
        events: one tuple per call.
    """

    def __init__(self) -> None:
        self.version, self.runtime, self.driver = "14.2.0", 13020, 13000
        self.nvrtc: tuple[int, int] | Exception = (13, 0)
        self.device_error: Exception | None = None
        self.compile_error = ""
        self.concurrent = 1
        self.stream, self.capability = 0, (9, 0)
        self.broken: set[int] = set()
        self.events: list[tuple[Any, ...]] = []

    def of(self, kind: str) -> list[tuple[Any, ...]]:
        return [event[1:] for event in self.events if event[0] == kind]

    @contextmanager
    def guard(self, kind: str, value: Any) -> Iterator[None]:
        self.events.append((f"enter {kind}", value))
        yield
        self.events.append((f"exit {kind}", value))

    # ---- the modules -----------------------------------------------------------------------

    def modules(self) -> dict[str, ModuleType]:
        cuda = module("cupy.cuda", runtime=self._runtime(), nvrtc=self._nvrtc())
        cuda.driver = SimpleNamespace(CUDADriverError=CUDADriverError)
        cuda.Device = lambda index: self.guard("cupy device", index)
        cuda.Stream = SimpleNamespace(from_external=self._from_external)
        cuda.malloc_managed = self._malloc_managed
        cupy = module("cupy", cuda=cuda, __version__=self.version, RawModule=self._raw_module)
        return {"cupy": cupy, "cupy.cuda": cuda}

    def _runtime(self) -> Any:
        def count() -> int:
            if self.device_error is not None:
                raise self.device_error
            return 1

        return SimpleNamespace(
            CUDARuntimeError=CUDARuntimeError,
            runtimeGetVersion=lambda: self.runtime,
            driverGetVersion=lambda: self.driver,
            getDeviceCount=count,
            cudaDevAttrConcurrentManagedAccess=89,
            cudaMemAdviseSetReadMostly=1,
            cudaMemAdviseSetPreferredLocation=3,
            cudaMemAdviseSetAccessedBy=5,
            deviceGetAttribute=lambda attribute, index: {89: self.concurrent}[attribute],
            memAdvise=lambda *call: self.events.append(("advise", *call)),
            memPrefetchAsync=lambda *call: self.events.append(("prefetch", *call)),
        )

    def _nvrtc(self) -> Any:
        def version() -> tuple[int, int]:
            if isinstance(self.nvrtc, Exception):
                raise self.nvrtc
            return self.nvrtc

        def compile_program(program: int, options: tuple[str, ...]) -> None:
            self.events.append(("compile", options))
            if self.compile_error:
                raise NVRTCError("NVRTC_ERROR_COMPILATION (6)")

        return SimpleNamespace(
            NVRTCError=NVRTCError,
            getVersion=version,
            getSupportedArchs=lambda: (75, 80, 86, 89, 90, 100),
            createProgram=lambda *call: self.events.append(("create", *call)) or 7,
            compileProgram=compile_program,
            getCUBIN=lambda program: b"machine code",
            getProgramLog=lambda program: self.compile_error,
            destroyProgram=lambda program: self.events.append(("destroy", program)),
        )

    def _from_external(self, stream: Any) -> Any:
        version, pointer = stream.__cuda_stream__()
        self.events.append(("wrap stream", version, pointer))
        # A CuPy stream can be entered again and again.
        outer = self

        class Stream:
            def __enter__(self) -> None:
                outer.events.append(("enter stream", pointer))

            def __exit__(self, *error: object) -> None:
                outer.events.append(("exit stream", pointer))

        return Stream()

    def _malloc_managed(self, nbytes: int) -> ManagedMemory:
        self.events.append(("malloc", nbytes))
        return ManagedMemory(nbytes)

    def _raw_module(self, *, path: str) -> Any:
        def load() -> None:
            self.events.append(("load", path))
            if len(self.of("load")) - 1 in self.broken:
                raise CUDADriverError("CUDA_ERROR_INVALID_IMAGE")

        def get_function(name: str) -> Any:
            self.events.append(("get_function", name))
            return lambda *call: self.events.append(("launch", name, *call))

        return SimpleNamespace(compile=load, get_function=get_function)

    # ---- torch -----------------------------------------------------------------------------

    def install(self, patch: pytest.MonkeyPatch, torch_cuda: str | None = "13.0") -> None:
        """Put the fakes in place of CuPy and of what torch says of its devices."""
        for name, fake in self.modules().items():
            patch.setitem(sys.modules, name, fake)
        patch.setattr(torch.version, "cuda", torch_cuda)
        properties = SimpleNamespace(multi_processor_count=132)
        for name, function in {
            "device": lambda device: self.guard("torch device", device),
            "current_stream": lambda device: SimpleNamespace(cuda_stream=self.stream),
            "get_device_capability": lambda device: self.capability,
            "get_device_properties": lambda device: properties,
            "get_device_name": lambda device: "NVIDIA Test",
            "is_current_stream_capturing": lambda: True,
        }.items():
            patch.setattr(torch.cuda, name, function)
        patch.setattr(torch, "as_tensor", as_tensor)


def module(name: str, **content: Any) -> Any:
    made = ModuleType(name)
    vars(made).update(content)
    return made


def as_tensor(exposed: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """As torch's: a view of the exposed memory that keeps the exposing object alive."""
    facts = exposed.__cuda_array_interface__
    (nbytes,), (address, read_only) = facts["shape"], facts["data"]
    assert (facts["typestr"], facts["version"], read_only) == ("|u1", 3, False)
    assert (device.type, dtype) == ("cuda", torch.uint8)
    memory = (ctypes.c_uint8 * nbytes).from_address(address)
    memory.owner = exposed
    return torch.frombuffer(memory, dtype=torch.uint8)
