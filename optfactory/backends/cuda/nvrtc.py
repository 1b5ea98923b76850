"""Compiles CUDA source to a GPU's machine code with NVRTC; needs neither driver nor toolkit.

`cupy.RawModule(code=...)` could do that too, but it always adds ``-ftz=true``, so that subnormal
numbers would become zeros, and it demands toolkit headers that no kernel of ours includes.
"""

from __future__ import annotations

import hashlib
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch

from optfactory.build.cache import cache_folder
from optfactory.build.once import building, install
from optfactory.errors import BackendError, KernelCompileError
from optfactory.memory.cupy import PORTABLE

# Every product and sum is rounded where the rule text says so, and subnormal numbers stay.
# Warning 177 is about the prelude's functions that a kernel does not use.
COMPILE_OPTIONS = ("-std=c++17", "--fmad=false", "--ftz=false", "--diag-suppress=177")
_LOG_LENGTH = 4000


@cache
def nvrtc_version() -> tuple[int, int]:
    """The version of the NVRTC library, e.g. (13, 0); loads it.

    Raises:
        BackendError: the library is missing.
    """
    from cupy.cuda import nvrtc, runtime

    try:
        major, minor = nvrtc.getVersion()
    except (ImportError, OSError, RuntimeError) as error:
        extra = runtime.runtimeGetVersion() // 1000
        package = f"nvidia-cuda-nvrtc=={extra}.*" if extra > 12 else "nvidia-cuda-nvrtc-cu12"
        raise BackendError(
            f'the CUDA compiler library NVRTC cannot be loaded; run: pip install "{package}" '
            f"(the extra optfactory[cuda{extra}] brings it), {PORTABLE}. CuPy said: "
            f"{str(error).strip()[:500]}"
        ) from error
    return int(major), int(minor)


def architecture_of(device: torch.device) -> str:
    """The architecture to compile for, such as sm_90.

    A device runs code of its own generation that is not newer than itself.

    Raises:
        BackendError: this NVRTC does not know the device's generation.
    """
    from cupy.cuda import nvrtc

    version = nvrtc_version()
    major, minor = torch.cuda.get_device_capability(device)
    supported: tuple[int, ...] = nvrtc.getSupportedArchs()
    fitting = [arch for arch in supported if arch // 10 == major and arch % 10 <= minor]
    if fitting:
        return f"sm_{max(fitting)}"
    if major * 10 + minor < min(supported):
        remedy = "install a torch built for an earlier CUDA and the optfactory extra for it"
    else:
        remedy = f'run: pip install -U "optfactory[cuda{version[0]}]"'
    raise BackendError(
        f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}, and NVRTC "
        f"{version[0]}.{version[1]} compiles for {', '.join(map(str, supported))}; "
        f"{remedy}, {PORTABLE}"
    )


def compile_cubin(
    source: str, name: str, architecture: str, options: tuple[str, ...] = ()
) -> tuple[bytes, str]:
    """Machine code for one architecture, and what the compiler said.

    Args:
        source: the complete text, without includes.
        name: what it is, for messages.
        architecture: such as ``sm_90``.
        options: in addition to `COMPILE_OPTIONS`.

    Raises:
        KernelCompileError: the compiler refused the source; carries its output.
        BackendError: the library is missing.
    """
    from cupy.cuda import nvrtc

    nvrtc_version()
    program = nvrtc.createProgram(source, f"{name}.cu", (), ())
    try:
        nvrtc.compileProgram(program, (*COMPILE_OPTIONS, f"-arch={architecture}", *options))
        # CuPy drops the last byte as if it ended a string; it is a zero of the file's headers.
        return nvrtc.getCUBIN(program) + b"\0", nvrtc.getProgramLog(program)
    except nvrtc.NVRTCError as error:
        raise KernelCompileError(
            f"NVRTC could not compile {name} for {architecture} ({error}); set "
            "OPTFACTORY_BACKEND=reference to run without kernels. The compiler said:\n"
            f"{nvrtc.getProgramLog(program)[:_LOG_LENGTH]}"
        ) from error
    finally:
        nvrtc.destroyProgram(program)


def cubin_file(source: str, name: str, architecture: str) -> Path:
    """The file with a source's machine code, from the cache if it was compiled before.

    Raises:
        KernelCompileError: as `compile_cubin`, or the cache cannot be written.
        BackendError: the library is missing.
    """
    identity: list[Any] = [source, architecture, nvrtc_version(), *COMPILE_OPTIONS]
    digest = hashlib.sha256("\0".join(map(str, identity)).encode()).hexdigest()[:24]
    path = cache_folder() / f"{name}-{digest}.cubin"
    if path.is_file():
        return path
    with building(path) as folder:
        if not path.is_file():
            started = time.monotonic()
            cubin, _ = compile_cubin(source, name, architecture)
            file = folder / "kernel.cubin"
            file.write_bytes(cubin)
            install(file, path, started)
    return path
