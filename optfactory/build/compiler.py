"""Compiles C++ kernels with the system compiler, once per source, flags and processor."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from optfactory.build.processor import cpuinfo, forced_set
from optfactory.errors import ConfigError, KernelCompileError, NoCompilerError

CACHE_VARIABLE = "OPTFACTORY_CACHE"

# No fast-math: what NaN, infinities, subnormals and divisions do is part of the specification,
# and without contraction every product and sum is rounded where the rule text says so.
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off")
_X86_FLAGS = ["-mprefer-vector-width=512"] if platform.machine() in ("x86_64", "AMD64") else []


def _attempts() -> list[list[str]]:
    """The flags to try one after the other, the fastest kernel first.

    Compilers without OpenMP or -march=native still build a kernel, only a slower one.
    """
    forced = forced_set()
    if forced is not None:
        return [[*forced.flags, "-fopenmp"], [*forced.flags, "-fopenmp-simd"]]
    return [
        ["-march=native", *_X86_FLAGS, "-fopenmp"],
        ["-march=native", "-fopenmp-simd"],
        [],
    ]


def find_compiler() -> list[str] | None:
    """The C++ compiler's command: the variable CXX, else the first of c++, g++, clang++.

    Raises:
        ConfigError: CXX cannot be read as a command.
    """
    try:
        named = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise ConfigError(f"CXX is no command: {error} (got {os.environ['CXX']!r})") from error
    candidates = [named] if named else [["c++"], ["g++"], ["clang++"]]
    return next((command for command in candidates if shutil.which(command[0])), None)


def compile_library(source: str, name: str) -> Path:
    """The shared library built from a C++ source, from the cache if it was built before.

    Args:
        source: the complete text.
        name: what it is, for file names and messages.

    Raises:
        NoCompilerError: no compiler was found.
        KernelCompileError: it refused the source; carries its output.
        ConfigError, BackendError: as `optfactory.build.processor.forced_set`.
    """
    attempts = _attempts()
    compiler = find_compiler()
    if compiler is None:
        raise NoCompilerError(
            f"cannot compile {name}: no C++ compiler was found; install one (e.g. g++), name it "
            "in the variable CXX, or set OPTFACTORY_BACKEND=reference"
        )
    folder = cache_folder()
    targets = [folder / f"{name}-{_digest(source, compiler, flags)}.so" for flags in attempts]
    built = next((target for target in targets if target.is_file()), None)
    if built is not None:
        return built
    output = ""
    for flags, target in zip(attempts, targets, strict=True):
        output = _compile(compiler, flags, source, target)
        if target.is_file():
            return target
    raise KernelCompileError(
        f"{shlex.join(compiler)} could not compile {name}; set OPTFACTORY_BACKEND=reference to "
        f"run without kernels. The compiler said:\n{output}"
    )


def load_library(source: str, name: str) -> ctypes.CDLL:
    """Compile a source, or find it in the cache, and load it.

    Raises:
        KernelCompileError: as `compile_library`, or the library cannot be loaded.
    """
    path = compile_library(source, name)
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        # A damaged file in the cache (a full disk, a copied folder): build it anew, once.
        path.unlink(missing_ok=True)
    path = compile_library(source, name)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelCompileError(
            f"the kernel {path} was compiled but cannot be loaded: {error}; "
            "set OPTFACTORY_BACKEND=reference to run without kernels"
        ) from error


def _compile(compiler: list[str], flags: list[str], source: str, target: Path) -> str:
    """Compile next to the target and move into place, so that others only see whole files."""
    with tempfile.TemporaryDirectory(prefix="build-", dir=target.parent) as build:
        text, library = Path(build, "kernel.cpp"), Path(build, "kernel.so")
        text.write_text(source, encoding="utf-8")
        command = [*compiler, *FLAGS, "-shared", *flags, str(text), "-o", str(library)]
        try:
            result = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            return str(error)
        if result.returncode == 0 and library.is_file():
            os.replace(library, target)
        return result.stderr[-4000:] or "nothing"


def _digest(source: str, compiler: list[str], flags: list[str]) -> str:
    executable = Path(shutil.which(compiler[0]) or compiler[0]).resolve()
    facts = executable.stat()
    identity = [
        source,
        *compiler,
        str(executable),
        str(facts.st_mtime_ns),
        str(facts.st_size),
        *FLAGS,
        *flags,
        _processor(),
    ]
    return hashlib.sha256("\0".join(identity).encode()).hexdigest()[:24]


@cache
def _processor() -> str:
    """What -march=native depends on; home folders are shared between unlike machines."""
    wanted = ("model name", "flags", "Features", "CPU part")
    lines = {line for line in cpuinfo().splitlines() if line.startswith(wanted)}
    return platform.machine() + platform.processor() + "".join(sorted(lines))


def cache_folder() -> Path:
    """A folder that only this user can write to: what lies in it is loaded as code."""
    chosen = os.environ.get(CACHE_VARIABLE)
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(chosen or Path(home, "optfactory"))
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = folder.stat()
        foreign = hasattr(os, "getuid") and (facts.st_uid != os.getuid() or facts.st_mode & 0o022)
        if not foreign and os.access(folder, os.W_OK):
            return folder
        reason = "belongs to or can be written by others" if foreign else "cannot be written"
    except OSError as error:
        reason = str(error)
    if chosen:
        raise KernelCompileError(
            f"the folder for compiled kernels, {folder}, is not usable: {reason}; "
            f"set {CACHE_VARIABLE} to a folder that only you can write to"
        )
    return _temporary_cache()


_TEMPORARY = "optfactory-kernels-"


@cache
def _temporary_cache() -> Path:
    return Path(tempfile.mkdtemp(prefix=_TEMPORARY))


def is_temporary(folder: Path) -> bool:
    """Whether a cache folder is of this process alone, because none could be had that stays."""
    return folder.name.startswith(_TEMPORARY)
