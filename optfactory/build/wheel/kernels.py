"""Compiles the kernels of a wheel, and says which machines it will then run on."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path

from optfactory.build.compiler import find_compiler
from optfactory.build.flags import FLAGS
from optfactory.build.prebuilt import relative_path
from optfactory.build.processor import InstructionSet, own_sets
from optfactory.build.wheel.variants import prebuilt_variants
from optfactory.errors import ConfigError, KernelCompileError, NoCompilerError
from optfactory.rules.codegen import KernelVariant, cpp_source

# Linked without -fopenmp: the library then names no OpenMP runtime, and takes the one that torch
# brought, whatever it is called there (see `optfactory.build.prebuilt`). As it names no other
# library either but those of glibc, it runs wherever its glibc symbols are.
_COMPILE = ("-g0", "-fopenmp", "-c")
_LINK = ("-shared", "-s", "-Wl,--as-needed")

# torch's wheels ask for a newer glibc than this one; pip knows its name since 2021.
_OLDEST_GLIBC = (2, 17)

Job = tuple[KernelVariant, InstructionSet]


def jobs(patterns: Sequence[str]) -> list[Job]:
    """The kernels to build: all, or those whose ``<instruction set>/<label>`` a glob matches.

    Raises:
        ConfigError: there are none for this machine, or none that a pattern matches.
    """
    found = [(variant, target) for target in own_sets() for variant in prebuilt_variants()]
    names = {job: f"{job[1].name}/{job[0].label}" for job in found}
    unused = [p for p in patterns if not any(fnmatchcase(name, p) for name in names.values())]
    if unused or not found:
        raise ConfigError(
            f"no kernels to build for {shlex.join(unused) or 'this kind of machine'}; "
            f"there are {', '.join(sorted(set(names.values()))) or 'none'}"
        )
    if not patterns:
        return found
    return [job for job in found if any(fnmatchcase(names[job], p) for p in patterns)]


def build(folder: Path, todo: Sequence[Job]) -> str:
    """Compile kernels into a folder, side by side on all cores.

    Returns:
        The platform tag of a wheel with them, e.g. ``manylinux_2_17_x86_64``.

    Raises:
        KernelCompileError: there is no compiler, it refused a kernel or cannot make one that runs
            on torch's OpenMP runtime.
    """
    compiler = find_compiler()
    if compiler is None:
        raise NoCompilerError(
            "cannot build kernels: no C++ compiler was found; install g++, name it in the variable "
            "CXX, or set OPTFACTORY_PREBUILT=0 to build the wheel without kernels"
        )
    cores = len(os.sched_getaffinity(0))
    print(f"building {len(todo)} kernels on {cores} cores", file=sys.stderr, flush=True)
    with ThreadPoolExecutor(cores) as pool:
        paths = list(pool.map(lambda job: _build_one(compiler, folder, *job), todo))
    return platform_tag(todo[0][1].machine, (path.read_bytes() for path in paths))


def platform_tag(machine: str, libraries: Iterable[bytes]) -> str:
    """The oldest manylinux platform whose glibc has all symbols that libraries ask for."""
    versions = {_OLDEST_GLIBC}
    for library in libraries:
        found = re.findall(rb"\0GLIBC_(\d+)\.(\d+)", library)
        versions |= {(int(major), int(minor)) for major, minor in found}
    major, minor = max(versions)
    return f"manylinux_{major}_{minor}_{machine}"


def _build_one(
    compiler: list[str], folder: Path, variant: KernelVariant, target: InstructionSet
) -> Path:
    source = cpp_source(variant)
    path = folder / relative_path(source, variant.label, target)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="kernel-") as temporary:
        text, binary = Path(temporary, "kernel.cpp"), Path(temporary, "kernel.o")
        text.write_text(source, encoding="utf-8")
        compile_flags = [*FLAGS, *target.flags, *_COMPILE]
        _run([*compiler, *compile_flags, str(text), "-o", str(binary)], variant.label)
        _run([*compiler, *_LINK, str(binary), "-o", str(path)], variant.label)
    if b"GOMP_parallel" not in path.read_bytes():
        raise KernelCompileError(
            f"{shlex.join(compiler)} does not build for GNU's OpenMP runtime, which torch has; "
            "name a g++ in the variable CXX, or set OPTFACTORY_PREBUILT=0 to build without kernels"
        )
    return path


def _run(command: list[str], label: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise KernelCompileError(
            f"{shlex.join(command)} could not build {label}; set OPTFACTORY_PREBUILT=0 to build "
            f"the wheel without kernels. It said:\n{done.stderr[-4000:]}"
        )
