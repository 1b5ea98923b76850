"""`optfactory doctor`: what this machine has, which backend a device gets and why, what is wrong.

Every finding is made by doing: the CPU's kernel is had and takes a step, the driver is asked, the
cache is written to.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from optfactory import __version__
from optfactory.backends import BACKEND_VARIABLE, backend_for
from optfactory.backends.cpu.fallback import FallbackBackend
from optfactory.build import prebuilt
from optfactory.build.cache import (
    CACHE_VARIABLE,
    REMEDY,
    cache_folder,
    forbids_running,
    is_temporary,
)
from optfactory.build.compiler import DEGRADED, find_compiler, lacking
from optfactory.build.flags import missing_flags, usable_flags, wanted_flags
from optfactory.build.processor import INSTRUCTIONS_VARIABLE, forced_set, runnable_sets
from optfactory.errors import BrokenCompilerError, OptFactoryError
from optfactory.factory import build_optimizer
from optfactory.families import installed

OK, NOTE, BROKEN = "ok", "note", "broken"
_LEAST_TORCH = (2, 6)
_MEND = "mend what the message names"
_VARIABLES = (BACKEND_VARIABLE, INSTRUCTIONS_VARIABLE, CACHE_VARIABLE, "CXX", "CUDA_PATH")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: what was looked at.
        status: ``ok``; ``note`` for what one should know; ``broken`` for what does not work.
        found: what was found.
        remedy: what to do; empty if nothing.
    """

    what: str
    status: str
    found: str
    remedy: str = ""

    def __str__(self) -> str:
        remedy = f"\n{'':31}-> {self.remedy}" if self.remedy else ""
        found = self.found.replace("\n", f"\n{'':31}")
        return f"{self.status:7}{self.what:23} {found}{remedy}"

    def as_dict(self) -> dict[str, str]:
        """The finding as JSON has it."""
        return asdict(self)


def checks() -> list[Finding]:
    """Look at everything; no finding stops the next one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they say is found here too
        return _look()


def _look() -> list[Finding]:
    found: list[Finding] = []
    for look in (
        _versions,
        _variables,
        _plugins,
        _processor,
        _instructions,
        _compiler,
        _cache,
        _cuda,
        _devices,
    ):
        what = look.__name__.strip("_")
        try:
            found += look()
        # Whatever goes wrong here is what the user wants to be told.
        except Exception as error:
            found.append(_broken(what, error))
    return found


def _broken(what: str, error: Exception) -> Finding:
    """What went wrong, the remedy with which messages of this package end, and what a tool said."""
    if isinstance(error, OptFactoryError):
        message, _, said = str(error).partition("\n")
        text, _, remedy = message.partition("; ")
        return Finding(what, BROKEN, f"{text}\n{said}".rstrip(), remedy or _MEND)
    return Finding(what, BROKEN, f"{type(error).__name__}: {error}".partition("\n")[0], _MEND)


def _versions() -> Iterator[Finding]:
    yield Finding("optfactory", OK, __version__)
    yield Finding("Python", OK, f"{platform.python_version()} ({sys.executable})")
    numbers = tuple(int(part) for part in torch.__version__.split(".")[:2])
    fits = numbers >= _LEAST_TORCH
    remedy = "" if fits else "optfactory needs torch 2.6 or newer: pip install -U torch"
    yield Finding("torch", OK if fits else BROKEN, torch.__version__, remedy)
    for package in ("pydantic", "hydra-core", "omegaconf"):
        try:
            yield Finding(package, OK, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(package, NOTE, "not installed", f"pip install {package}")


def _variables() -> Iterator[Finding]:
    for name in _VARIABLES:
        if name in os.environ:
            yield Finding(name, NOTE, f"is set to {os.environ[name]!r}")


def _plugins() -> Iterator[Finding]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they say is found here too
        found = installed()
    for plugin in found:
        if plugin.problem:
            what, _, remedy = plugin.problem.rpartition("; ")
            yield Finding(plugin.package, BROKEN, f"entry point '{plugin.entry}': {what}", remedy)
        if plugin.classes:
            names = ", ".join(item.family for item in plugin.classes)
            yield Finding(plugin.package, OK, f"adds the optimizers {names}")


def _processor() -> Iterator[Finding]:
    sets = ", ".join(item.name for item in runnable_sets()) or "unknown"
    yield Finding("processor", OK, f"{platform.machine()}; instruction sets: {sets}")


def _instructions() -> Iterator[Finding]:
    forced = forced_set()
    if forced:
        yield Finding("instructions", NOTE, f"{INSTRUCTIONS_VARIABLE} insists on {forced.name}")


def _compiler() -> Iterator[Finding]:
    if prebuilt.available():
        yield Finding("prebuilt kernels", OK, str(prebuilt.FOLDER))
    command = find_compiler()
    if command:
        yield _compiler_at_work(command)
    else:
        named = os.environ.get("CXX")
        found = f"CXX names {named!r}, which is not there" if named else "none found"
        remedy = "install g++ or clang++, or name one that exists in the variable CXX"
        yield Finding("C++ compiler", NOTE, found, remedy)


def _compiler_at_work(command: list[str]) -> Finding:
    """Whether it builds a library, and with all flags."""
    what, wanted = "C++ compiler", wanted_flags()
    try:
        with tempfile.TemporaryDirectory(prefix="optfactory-") as folder:
            usable = usable_flags(command, wanted, Path(folder))
    except BrokenCompilerError as error:
        return _broken(what, error)
    missing = missing_flags(wanted, usable)
    if not missing:
        return Finding(what, OK, shlex.join(command))
    found, _, remedy = lacking(command, missing).partition("; ")
    return Finding(what, NOTE, found, remedy)


def _cache() -> Iterator[Finding]:
    folder = cache_folder()
    kernels = list(folder.glob("*.so"))
    size = sum(kernel.stat().st_size for kernel in kernels) / 1e6
    found = f"{folder}: {len(kernels)} kernels, {size:.1f} MB"
    if is_temporary(folder):
        yield Finding("kernel cache", NOTE, f"{folder}, compiled anew by every process", REMEDY)
        return
    if forbids_running(folder):
        remedy = f"set {CACHE_VARIABLE} to a folder whose programs may be run"
        yield Finding("kernel cache", NOTE, f"{found}; mounted noexec, so they are copied", remedy)
        return
    with tempfile.TemporaryFile(dir=folder):
        yield Finding("kernel cache", OK, found)
    degraded = [kernel for kernel in kernels if f"-{DEGRADED}-" in kernel.name]
    if degraded:
        found = f"{len(degraded)} in the cache, built by a compiler that lacked some flags"
        yield Finding("degraded kernels", NOTE, found)


def _cuda() -> Iterator[Finding]:
    built_for = torch.version.cuda
    count = torch.cuda.device_count()
    if not built_for:
        yield Finding("CUDA", OK, "torch is built without it; GPUs are not used")
        return
    if not count:
        yield Finding("CUDA", NOTE, f"torch is built for {built_for}, and sees no GPU")
        return
    yield Finding("CUDA", OK, f"torch is built for {built_for} and sees {count} GPU(s)")
    # Not needed, and perhaps not installed, where there is no GPU.
    from optfactory.memory.cupy import load_cupy

    try:
        cupy = load_cupy()
    except OptFactoryError as error:
        yield Finding("CuPy", BROKEN, "cannot be used", str(error))
        return
    version = cupy.cuda.runtime.driverGetVersion()
    driver = f"{version // 1000}.{version % 1000 // 10}"
    yield Finding("CuPy", OK, f"{cupy.__version__}; the driver supports CUDA {driver}")


def _devices() -> Iterator[Finding]:
    names = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        names.append("mps")
    for name in names:
        yield _step(torch.device(name))


def _step(device: torch.device) -> Finding:
    """Take a step of 8-bit state on a device, and compare it with what every Adam does first."""
    what = f"step on {device}"
    try:
        backend = backend_for(device)
        error = _first_step_error(device)
    except Exception as failure:
        return _broken(what, failure)
    name, problem = backend.name, ""
    if isinstance(backend, FallbackBackend):
        problem = backend.problem
    if not error <= 1e-5:
        found = f"backend '{name}' is wrong by {error:.1e}"
        return Finding(what, BROKEN, found, "please report this as a bug")
    if problem:
        return Finding(what, NOTE, f"plain torch operations, because {problem}: slower")
    if name != "reference":
        how = "CUDA kernels, compiled by NVRTC" if name == "cuda" else "kernels for this processor"
        prebuilt_only = name == "cpu" and not find_compiler()
        return Finding(what, OK, f"backend '{name}': {how}{', prebuilt' * prebuilt_only}")
    if os.environ.get(BACKEND_VARIABLE) == "reference":
        return Finding(what, OK, f"plain torch operations, as {BACKEND_VARIABLE} asks")
    why = "there is no compiler" if device.type == "cpu" else "there are no kernels for it"
    return Finding(what, NOTE, f"plain torch operations, because {why}: slower")


def _first_step_error(device: torch.device) -> float:
    """How far a first step is from -lr * sign(gradient), which it is for every Adam, by the lr."""
    parameter = torch.nn.Parameter(torch.zeros(16, 512, dtype=torch.float32, device=device))
    parameter.grad = torch.linspace(-1, 1, 8192, dtype=torch.float32, device=device).view_as(
        parameter
    )
    build_optimizer("adamw8bit", [parameter], lr=1.0, eps=0.0).step()
    apart = (parameter.detach() + parameter.grad.sign()).abs().max()
    return float(apart)
