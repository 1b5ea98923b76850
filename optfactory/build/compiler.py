"""Compiles C++ kernels with the system compiler, once per source, flags and processor."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import tempfile
import time
from functools import cache
from pathlib import Path

from optfactory.build.cache import CACHE_VARIABLE, cache_folder, other_folders, warn_once
from optfactory.build.flags import (
    FLAGS,
    Flags,
    build,
    missing_flags,
    usable_flags,
    wanted_flags,
)
from optfactory.build.once import building, install
from optfactory.build.processor import cpuinfo
from optfactory.errors import (
    BrokenCompilerError,
    ConfigError,
    KernelCompileError,
    NoCompilerError,
)

DEGRADED = "degraded"  # in the file names of kernels that lack some of the wanted flags


def find_compiler() -> list[str] | None:
    """The C++ compiler's command: the variable CXX, else the first of c++, g++, clang++.

    Raises:
        ConfigError: CXX cannot be read as a command.
    """
    try:
        named = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise ConfigError(f"CXX is no command: {error} (got {os.environ['CXX']!r})") from error
    if named:
        named[0] = os.path.expanduser(named[0])
    candidates = [named] if named else [["c++"], ["g++"], ["clang++"]]
    return next((command for command in candidates if shutil.which(command[0])), None)


def compile_library(source: str, name: str) -> Path:
    """The shared library built from a C++ source, from the cache if it was built before.

    Args:
        source: the complete text.
        name: what it is, for file names and messages.

    Raises:
        NoCompilerError: no compiler was found.
        BrokenCompilerError: it builds nothing.
        KernelCompileError: it refused the source; carries its output. Or the cache is not usable.
        ConfigError, BackendError: as `optfactory.build.processor.forced_set`.
    """
    wanted = wanted_flags()
    compiler = find_compiler()
    if compiler is None:
        raise NoCompilerError(
            f"cannot compile {name}: no C++ compiler was found; install one (e.g. g++), name it "
            "in the variable CXX, or set OPTFACTORY_BACKEND=reference"
        )
    best = cache_folder() / f"{name}-{_digest(source, compiler, wanted)}.so"
    if best.is_file():
        return best
    with building(best) as folder:
        if best.is_file():
            return best
        flags = usable_flags(compiler, wanted, folder)
        target = best
        if missing := missing_flags(wanted, flags):
            warn_once(f"{lacking(compiler, missing)}.")
            digest = _digest(source, compiler, flags)
            target = best.with_name(f"{name}-{DEGRADED}-{digest}.so")
        if not target.is_file():
            _compile(compiler, flags, source, folder, target)
        return target


def lacking(compiler: list[str], missing: Flags) -> str:
    """What it means that a compiler lacks flags, and what to do."""
    return (
        f"{shlex.join(compiler)} does not take {' '.join(missing)}: CPU kernels are built without "
        "and are slower; install what it lacks (e.g. libomp for -fopenmp), or name another "
        "compiler in the variable CXX"
    )


def load_library(source: str, name: str) -> ctypes.CDLL:
    """Compile a source, or find it in the cache, and load it.

    Raises:
        BrokenCompilerError: the library cannot be loaded.
        KernelCompileError, ConfigError, BackendError: as `compile_library`.
    """
    path = compile_library(source, name)
    try:
        return _load(path)
    except OSError:
        # A damaged file in the cache (a full disk, a copied folder): build it anew, once.
        path.unlink(missing_ok=True)
    path = compile_library(source, name)
    try:
        return _load(path)
    except OSError as error:
        raise BrokenCompilerError(
            f"the kernel {path} was compiled but cannot be loaded: {error}; "
            f"set {CACHE_VARIABLE} to a folder whose programs may be run, name another compiler in "
            "the variable CXX, or set OPTFACTORY_BACKEND=reference to run without kernels"
        ) from error


def _load(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        # On a file system mounted noexec a good library cannot be loaded, but a copy elsewhere can.
        library = _load_copy(path)
        if library is None:
            raise
    warn_once(
        f"nothing can be run from the folder for compiled kernels, {path.parent}, which may be on "
        "a file system mounted noexec: kernels are copied to another place by every process. Set "
        f"{CACHE_VARIABLE} to a folder whose programs may be run."
    )
    return library


def _load_copy(path: Path) -> ctypes.CDLL | None:
    for other in other_folders(path.parent):
        try:
            # Removed at once: what is loaded stays.
            with tempfile.TemporaryDirectory(
                prefix="optfactory-", dir=other, ignore_cleanup_errors=True
            ) as folder:
                return ctypes.CDLL(str(shutil.copy(path, folder)))
        except OSError:
            continue
    return None


def _compile(compiler: list[str], flags: Flags, source: str, folder: Path, target: Path) -> None:
    started = time.monotonic()
    built = folder / "kernel.so"
    if said := build(compiler, flags, source, built):
        raise KernelCompileError(
            f"{shlex.join(compiler)} could not compile {target.stem}; set "
            "OPTFACTORY_BACKEND=reference to run without kernels. The compiler said:\n"
            f"{said}"
        )
    install(built, target, started)


def _digest(source: str, compiler: list[str], flags: Flags) -> str:
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
