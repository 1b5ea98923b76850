"""Compiles CUDA sources for this processor, with the emulator's headers around them."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from optfactory.build.cache import CACHE_VARIABLE
from optfactory.build.compiler import find_compiler
from optfactory.errors import KernelCompileError

_FOLDER = Path(__file__).parent
_INPUTS = ("build.py", "runtime.h", "context.h", "host.h", "warp.h", "emulator.h", "entry.h")

_FLAGS = ["-std=c++17", "-O2", "-fPIC", f"-I{_FOLDER}", "-fno-math-errno", "-ffp-contract=off"]
_MACROS = ["-D__CUDACC__=1", "-D__CUDA_ARCH__=800", "-DOPTFACTORY_EMULATED=1"]
# Strict aliasing is off because CUDA code reads arrays as vectors, which GPUs allow. What the
# sanitizers find is undefined on GPUs too, or defined otherwise than here.
_KERNEL_FLAGS = ["-fno-strict-aliasing", "-fno-threadsafe-statics"]
_KERNEL_FLAGS += ["-fsanitize=alignment,null,bounds,shift-exponent,integer-divide-by-zero"]
_KERNEL_FLAGS += ["-fsanitize=signed-integer-overflow,float-cast-overflow"]
# Not every compiler has these: locals that were never set are huge numbers and absurd indices, and
# the bounds of arrays at the end of a struct are checked too.
_OPTIONAL_FLAGS = {
    "auto-var-init": "-ftrivial-auto-var-init=pattern",
    "bounds-strict": "-fsanitize=bounds-strict",
}

_KERNELS = re.compile(
    r"__global__\s+(?:void\s+)?(?:__launch_bounds__\s*\([^()]*\)\s*)?(?:void\s+)?(\w+)\s*\("
)


@functools.cache
def load_kernels(source: str, name: str) -> ctypes.CDLL:
    """A library with a function `emulator_entry_<kernel>` for each kernel of a CUDA source.

    Raises:
        KernelCompileError: the compiler refused the source; carries its output.
    """
    _load_runtime()
    return ctypes.CDLL(str(_cached(source, name, _build_kernels)))


@functools.cache
def _load_runtime() -> ctypes.CDLL:
    text = (_FOLDER / "runtime.cpp").read_text(encoding="utf-8")
    path = _cached(text, "emulator_runtime", _build_runtime)
    return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)  # kernels find its functions


class _Build:
    """One run of the compiler after the other in a folder."""

    def __init__(self, name: str, command: list[str], folder: Path) -> None:
        self.name, self._command, self._folder = name, command, folder

    def write(self, text: str) -> str:
        path = self._folder / "source.cpp"
        path.write_text(text, encoding="utf-8")
        return str(path)

    def run(self, *arguments: str) -> str:
        """What the compiler prints."""
        result = self._try(arguments)
        unknown = [flag for part, flag in _OPTIONAL_FLAGS.items() if part in result.stderr]
        if result.returncode != 0 and unknown:
            result = self._try([part for part in arguments if part not in unknown])
        if result.returncode != 0:
            raise KernelCompileError(
                f"{shlex.join(self._command)} could not compile {self.name} for the emulator:\n"
                f"{result.stderr[-4000:]}"
            )
        return result.stdout

    def link(self, text: str, flags: Sequence[str]) -> Path:
        # Linked apart from -fsanitize, which would add the sanitizers' own library.
        self.run(*flags, "-c", self.write(text), "-o", "compiled.o")
        self.run("-shared", "compiled.o", "-o", "library.so")
        return self._folder / "library.so"

    def _try(self, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
        command = [*self._command, *arguments]
        return subprocess.run(
            command, cwd=self._folder, capture_output=True, text=True, check=False
        )


def _build_runtime(build: _Build, text: str) -> Path:
    return build.link(text, _FLAGS)


def _build_kernels(build: _Build, source: str) -> Path:
    # Preprocessed first, because a kernel may be left out by an #if.
    plain = build.run(*_FLAGS, *_MACROS, "-E", "-P", build.write(source))
    lines = [f'#include "emulator.h"\n#line 1 "{build.name}.cu"', source, '#include "entry.h"']
    lines += [f"EMULATOR_ENTRY({kernel})" for kernel in _KERNELS.findall(plain)]
    flags = [*_FLAGS, *_MACROS, *_KERNEL_FLAGS, *_OPTIONAL_FLAGS.values(), *_processor_flags()]
    return build.link("\n".join(lines) + "\n", flags)


def _cached(text: str, name: str, build: Callable[[_Build, str], Path]) -> Path:
    """The shared library of a source, from the cache if any process built it before."""
    command = find_compiler()
    if command is None:
        raise KernelCompileError(f"cannot emulate {name}: no C++ compiler was found")
    parts = [text, *command, str(shutil.which(command[0])), *_processor_flags(), str(_FOLDER)]
    parts += [(_FOLDER / part).read_text(encoding="utf-8") for part in _INPUTS]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    target = _cache_folder() / f"{name}-emulated-{digest}.so"
    # One process compiles, and others that want the same wait for it instead of doing it again.
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_file():
            with tempfile.TemporaryDirectory(prefix="build-", dir=target.parent) as folder:
                os.replace(build(_Build(name, command, Path(folder)), text), target)
    return target


@functools.cache
def _processor_flags() -> list[str]:
    """Fused multiply-adds are exact without them too, but then each is a call."""
    cpuinfo = Path("/proc/cpuinfo")
    has_fma = cpuinfo.is_file() and " fma " in cpuinfo.read_text(encoding="utf-8", errors="replace")
    return ["-mfma"] if has_fma else []


def _cache_folder() -> Path:
    chosen = os.environ.get(CACHE_VARIABLE)
    folder = Path(chosen).expanduser() if chosen else _temporary_folder()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


@functools.cache
def _temporary_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="optfactory-emulated-"))
