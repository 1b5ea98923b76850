"""Backends: who does the arithmetic on a device.

`cuda` runs the kernels in `kernels/` on NVIDIA GPUs, `cpu` those for the machine's CPU, prebuilt or
compiled, and `reference` runs the same rule texts as plain torch operations, on any device.
"""

from __future__ import annotations

import os
import warnings
from functools import cache

import torch

from optfactory.backends.base import WARM_UP, Backend
from optfactory.backends.cpu.backend import CpuBackend
from optfactory.backends.cpu.fallback import FallbackBackend
from optfactory.backends.reference.backend import ReferenceBackend
from optfactory.build import prebuilt
from optfactory.build.compiler import find_compiler
from optfactory.errors import ConfigError

BACKEND_VARIABLE = "OPTFACTORY_BACKEND"
_CHOICES = ("auto", "cpu", "reference")

__all__ = ["BACKEND_VARIABLE", "WARM_UP", "Backend", "backend_for"]


def backend_for(device: torch.device) -> Backend:
    """The backend that updates parameters on a device.

    The environment variable OPTFACTORY_BACKEND chooses: ``auto`` (the default) takes kernels where
    they can be had, ``cpu`` insists on them for CPU tensors, ``reference`` never uses them. CUDA
    tensors always get the CUDA kernels unless it says ``reference``.

    Raises:
        ConfigError: the variable, or OPTFACTORY_INSTRUCTIONS, has another value.
        BackendError: the device is a GPU, and CuPy or its driver is missing or does not fit.
    """
    choice = os.environ.get(BACKEND_VARIABLE, "auto")
    if choice not in _CHOICES:
        raise ConfigError(f"{BACKEND_VARIABLE} is {choice!r}; allowed are {', '.join(_CHOICES)}")
    return _backend(device.type, choice)


@cache
def _backend(device_type: str, choice: str) -> Backend:
    if choice == "reference":
        return ReferenceBackend()
    if device_type == "cuda":
        return _cuda_backend()
    if device_type != "cpu":
        _warn_portable(f"optfactory has no kernels for '{device_type}' devices yet")
        return ReferenceBackend()
    if choice == "cpu":
        return CpuBackend()
    if find_compiler() or prebuilt.available():
        return FallbackBackend()
    _warn_portable(
        "no C++ compiler was found; install one (e.g. g++) or name it in the variable CXX"
    )
    return ReferenceBackend()


def _cuda_backend() -> Backend:
    # Not needed, and perhaps not installed, where there is no GPU.
    from optfactory.backends.cuda.backend import CudaBackend
    from optfactory.backends.cuda.cupy_driver import cupy_driver

    return CudaBackend(cupy_driver())


def _warn_portable(reason: str) -> None:
    # The result is cached per device type, so that this is said once.
    warnings.warn(
        f"{reason}. Optimizer steps run as plain torch operations: correct, but slower.",
        stacklevel=2,
    )
