"""CuPy, imported when a CUDA device is first used, and checked against torch and the driver."""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

import torch

from optfactory.errors import BackendError

CUDA_MAJORS = (12, 13)
# Earlier releases do not find the NVRTC library that pip installs.
_MIN_CUPY_MAJOR = 14
PORTABLE = "or set OPTFACTORY_BACKEND=reference to run as plain torch operations, without kernels"


@cache
def load_cupy() -> Any:
    """The package cupy, after checking that it can run here.

    Raises:
        BackendError: torch, CuPy and the NVIDIA driver do not fit together.
    """
    torch_major = _torch_cuda_major()
    cupy = _import_cupy(torch_major)
    _check_cupy(cupy, torch_major)
    _check_driver(cupy)
    return cupy


def version_text(number: int) -> str:
    """CUDA's version numbers as people write them: 13020 is 13.2."""
    return f"{number // 1000}.{number % 1000 // 10}"


def _torch_cuda_major() -> int:
    version = torch.version.cuda
    if version is None:
        kind = "for ROCm" if torch.version.hip else "without CUDA"
        raise BackendError(
            f"torch {torch.__version__} was built {kind}, and the CUDA kernels need one built "
            f"for CUDA 12 or 13; install it as https://pytorch.org says, {PORTABLE}"
        )
    major = int(version.split(".")[0])
    if major not in CUDA_MAJORS:
        raise BackendError(
            f"torch {torch.__version__} was built for CUDA {version}, and the CUDA kernels need "
            f"CUDA 12 or 13; install another build as https://pytorch.org says, {PORTABLE}"
        )
    return major


def _import_cupy(torch_major: int) -> ModuleType:
    install = f'pip install "optfactory[cuda{torch_major}]"'
    try:
        import cupy
    except ModuleNotFoundError as error:
        if error.name != "cupy":
            raise _broken(error, install) from error
        raise BackendError(
            f"CUDA parameters need CuPy, which is not installed; run: {install} "
            f"(torch is built for CUDA {torch.version.cuda}), {PORTABLE}"
        ) from error
    except ImportError as error:
        raise _broken(error, install) from error
    module: ModuleType = cupy
    return module


def _broken(error: ImportError, install: str) -> BackendError:
    return BackendError(
        f"CuPy is installed but cannot be imported; reinstall it: {install} --force-reinstall, "
        f"{PORTABLE}. It said:\n{str(error).strip()[:2000]}"
    )


def _check_cupy(cupy: Any, torch_major: int) -> None:
    version = cupy.cuda.runtime.runtimeGetVersion()
    major = version // 1000
    if major != torch_major:
        raise BackendError(
            f"torch is built for CUDA {torch.version.cuda}, but CuPy {cupy.__version__} for CUDA "
            f"{version_text(version)}; run: pip uninstall -y cupy-cuda{major}x && "
            f'pip install "optfactory[cuda{torch_major}]", {PORTABLE}'
        )
    if int(cupy.__version__.split(".")[0]) < _MIN_CUPY_MAJOR:
        raise BackendError(
            f"CuPy {cupy.__version__} is too old, the CUDA kernels need {_MIN_CUPY_MAJOR} or "
            f'newer; run: pip install -U "optfactory[cuda{torch_major}]", {PORTABLE}'
        )


def _check_driver(cupy: Any) -> None:
    runtime = cupy.cuda.runtime
    needed, found = runtime.runtimeGetVersion(), runtime.driverGetVersion()
    if found == 0:
        raise BackendError(
            f"no NVIDIA driver was found, and CUDA {version_text(needed)} needs one; "
            f"install it as https://www.nvidia.com/drivers says, {PORTABLE}"
        )
    try:
        runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        if found // 1000 >= needed // 1000 and "InsufficientDriver" not in str(error):
            raise BackendError(
                f"CuPy cannot use any CUDA device: {error}; check that nvidia-smi lists it and "
                f"that CUDA_VISIBLE_DEVICES does not hide it, {PORTABLE}"
            ) from error
        raise _old_driver(needed, found) from error
    if found // 1000 < needed // 1000:
        raise _old_driver(needed, found)


def _old_driver(needed: int, found: int) -> BackendError:
    other = ""
    if found // 1000 in CUDA_MAJORS and found // 1000 != needed // 1000:
        major = found // 1000
        other = (
            f", or install a torch built for CUDA {major} and "
            f"pip uninstall -y cupy-cuda{needed // 1000}x && "
            f'pip install "optfactory[cuda{major}]"'
        )
    return BackendError(
        f"the NVIDIA driver is too old: it supports CUDA {version_text(found)}, and torch and CuPy "
        f"use CUDA {version_text(needed)}; update the driver{other}, {PORTABLE}"
    )
