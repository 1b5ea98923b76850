"""Fixtures that every test may use: the backend, one kernel cache, fixed seeds and threads."""

from __future__ import annotations

import importlib.util
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from optfactory.backends.cuda.backend import CudaBackend
from tests.defaults import patch_optimizer
from tests.emulation.driver import EmulatedDriver
from tests.sampling import keep_a_sample

CPU_BACKENDS = ("cpu", "reference", "emulated")
BACKENDS = (*CPU_BACKENDS, pytest.param("cuda", marks=pytest.mark.gpu))

# For tests with the fixture `backend` that ask something of CPUs only.
on_cpus = pytest.mark.parametrize("backend", CPU_BACKENDS, indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    keep_a_sample(config, items)


def missing_gpu() -> str:
    """Why the CUDA backend cannot run here; empty if it can."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    return "" if importlib.util.find_spec("cupy") else "CuPy is not installed"


def has_compiler() -> bool:
    """Whether a C++ compiler is there for the native backend."""
    candidates = (os.environ.get("CXX"), "c++", "g++", "clang++")
    return any(shutil.which(name) for name in candidates if name)


@pytest.fixture(scope="session", autouse=True)
def kernel_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One folder of compiled kernels for all workers of a run, so that each compiles once."""
    with pytest.MonkeyPatch.context() as patch:
        given = os.environ.get("OPTFACTORY_CACHE")
        base = tmp_path_factory.getbasetemp()
        shared = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
        folder = Path(given) if given else shared / "kernel_cache"
        patch.setenv("OPTFACTORY_CACHE", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def fixed_conditions() -> Iterator[None]:
    """The same random numbers in every test, and no more threads than there are cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if os.environ.get("PYTEST_XDIST_WORKER") else 2)
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def foreign_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_optimizer(monkeypatch)


@pytest.fixture(params=BACKENDS)
def backend(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, fixed_conditions: None
) -> Iterator[str]:
    """Runs a test on the native and on the portable backend, and with CUDA kernels.

    With "cuda", tensors are made on the GPU wherever a test names no device. The portable one gets
    a single thread: its many small operations only wait for a second.
    """
    name = str(request.param)
    if name == "cpu" and not has_compiler():
        pytest.skip("no C++ compiler for the native backend")
    if name == "cuda":
        if missing_gpu():
            pytest.skip(missing_gpu())
        monkeypatch.delenv("OPTFACTORY_BACKEND", raising=False)
        torch.set_default_device("cuda")
    elif name == "emulated":
        backend = CudaBackend(EmulatedDriver())
        monkeypatch.setattr("optfactory.backends.backend_for", lambda device: backend)
    else:
        monkeypatch.setenv("OPTFACTORY_BACKEND", name)
    torch.set_num_threads(2 if name == "cpu" else 1)
    yield name
    if name == "cuda":
        torch.set_default_device(None)
