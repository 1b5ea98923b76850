"""CuPy as the CUDA driver: what it is asked to do, and what is said where it cannot."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from optfactory.backends.cuda import cupy_driver as cupy_driver_module
from optfactory.backends.cuda import nvrtc
from optfactory.backends.cuda.cupy_driver import CupyDriver, cupy_driver
from optfactory.build import once
from optfactory.errors import BackendError, KernelCompileError, OptFactoryError
from optfactory.memory import cupy, managed
from tests.unit.fake_cupy import CUDARuntimeError, FakeCupy

DEVICE = torch.device("cuda", 1)
SOURCE = 'extern "C" __global__ void f(float* p) {}'
CACHES = (
    *(cupy.load_cupy, nvrtc.nvrtc_version, managed.concurrent_managed_access),
    *(cupy_driver, cupy_driver_module._multiprocessors),
)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[FakeCupy]:
    """A machine with a GPU, torch for CUDA 13 and all that is needed; nothing is cached."""
    for cached in CACHES:
        cached.cache_clear()
    machine = FakeCupy()
    machine.install(monkeypatch)
    yield machine
    for cached in CACHES:
        cached.cache_clear()


def refusal() -> str:
    """What the driver says; every message also names the way without kernels."""
    with pytest.raises(BackendError) as caught:
        cupy_driver()
    assert isinstance(caught.value, OptFactoryError)
    assert isinstance(caught.value, RuntimeError)
    assert "OPTFACTORY_BACKEND=reference" in str(caught.value)
    return str(caught.value)


# ---- what the machine lacks ------------------------------------------------------------------


def test_importing_the_driver_loads_no_cupy() -> None:
    code = "import sys, optfactory.backends.cuda.cupy_driver, optfactory.memory.managed;"
    code += "sys.exit(any(name.startswith('cupy') for name in sys.modules))"
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


@pytest.mark.parametrize(("version", "extra"), [("13.0", "cuda13"), ("12.8", "cuda12")])
def test_without_cupy_the_extra_for_torchs_cuda_is_named(
    fake: FakeCupy, monkeypatch: pytest.MonkeyPatch, version: str, extra: str
) -> None:
    fake.install(monkeypatch, torch_cuda=version)
    monkeypatch.setitem(sys.modules, "cupy", None)
    message = refusal()
    assert "CuPy, which is not installed" in message
    assert f'pip install "optfactory[{extra}]"' in message
    assert f"CUDA {version}" in message


def test_a_cupy_that_cannot_be_imported_says_why(
    fake: FakeCupy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delitem(sys.modules, "cupy")
    (tmp_path / "cupy.py").write_text("import a_missing_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    message = refusal()
    assert 'pip install "optfactory[cuda13]" --force-reinstall' in message
    assert "a_missing_dependency" in message


@pytest.mark.parametrize(
    ("version", "hip", "words"),
    [
        (None, None, "built without CUDA"),
        (None, "6.4", "built for ROCm"),
        ("11.8", None, "built for CUDA 11.8"),
    ],
)
def test_another_torch_is_asked_for(
    fake: FakeCupy, monkeypatch: pytest.MonkeyPatch, version: str, hip: str, words: str
) -> None:
    fake.install(monkeypatch, torch_cuda=version)
    monkeypatch.setattr(torch.version, "hip", hip)
    message = refusal()
    assert f"torch {torch.__version__} was {words}" in message
    assert "CUDA 12 or 13" in message
    assert "https://pytorch.org" in message


def test_cupy_for_another_cuda_than_torchs(fake: FakeCupy, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.install(monkeypatch, torch_cuda="12.8")
    message = refusal()
    assert "torch is built for CUDA 12.8, but CuPy 14.2.0 for CUDA 13.2" in message
    assert 'pip uninstall -y cupy-cuda13x && pip install "optfactory[cuda12]"' in message


def test_an_old_cupy(fake: FakeCupy, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.version = "13.6.0"
    fake.install(monkeypatch)
    message = refusal()
    assert "CuPy 13.6.0 is too old" in message
    assert 'pip install -U "optfactory[cuda13]"' in message


def test_no_driver(fake: FakeCupy) -> None:
    fake.driver = 0
    message = refusal()
    assert "no NVIDIA driver was found" in message
    assert "https://www.nvidia.com/drivers" in message


@pytest.mark.parametrize("error", [None, CUDARuntimeError("cudaErrorInsufficientDriver: ...")])
def test_a_driver_of_the_cuda_before(fake: FakeCupy, error: Exception | None) -> None:
    fake.driver, fake.device_error = 12040, error
    message = refusal()
    assert "the NVIDIA driver is too old: it supports CUDA 12.4" in message
    assert "torch and CuPy use CUDA 13.2" in message
    assert "update the driver, or install a torch built for CUDA 12" in message
    assert 'pip uninstall -y cupy-cuda13x && pip install "optfactory[cuda12]"' in message


def test_a_driver_that_cuda_finds_too_old_for_another_reason(fake: FakeCupy) -> None:
    fake.device_error = CUDARuntimeError("cudaErrorInsufficientDriver: too old")
    message = refusal()
    assert "driver is too old: it supports CUDA 13.0" in message
    assert "update the driver, or set" in message


def test_no_usable_device(fake: FakeCupy) -> None:
    fake.device_error = CUDARuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected")
    message = refusal()
    assert "cudaErrorNoDevice" in message
    assert "CUDA_VISIBLE_DEVICES" in message


@pytest.mark.parametrize(
    ("runtime", "version", "package"),
    [(13020, "13.0", "nvidia-cuda-nvrtc==13.*"), (12090, "12.9", "nvidia-cuda-nvrtc-cu12")],
)
def test_without_the_compiler_library_its_package_is_named(
    fake: FakeCupy, monkeypatch: pytest.MonkeyPatch, runtime: int, version: str, package: str
) -> None:
    fake.runtime, fake.nvrtc = runtime, RuntimeError('Failure finding "libnvrtc.so.13"')
    fake.install(monkeypatch, torch_cuda=version)
    message = refusal()
    assert f'pip install "{package}"' in message
    assert f"optfactory[cuda{runtime // 1000}] brings it" in message
    assert "libnvrtc.so.13" in message


def test_after_a_refusal_the_driver_can_be_made(fake: FakeCupy) -> None:
    fake.driver = 0
    refusal()
    fake.driver = 13000
    assert cupy_driver() is cupy_driver()
    assert isinstance(cupy_driver(), CupyDriver)


# ---- compiling -------------------------------------------------------------------------------


def test_a_source_is_compiled_once_and_loaded_once_per_device(fake: FakeCupy, cache: Path) -> None:
    driver, other = cupy_driver(), torch.device("cuda", 0)
    first = driver.module(SOURCE, "probe", 512, DEVICE)
    assert driver.module(SOURCE, "another name", 512, DEVICE) is first
    assert driver.module(SOURCE, "probe", 512, other) is not first
    assert driver.module(SOURCE, "probe", 256, DEVICE) is not first
    ((options,),) = fake.of("compile")
    assert options == (*nvrtc.COMPILE_OPTIONS, "-arch=sm_90")
    assert {"-std=c++17", "--fmad=false", "--ftz=false"} <= set(options)
    assert not any("fast" in option for option in options)
    assert fake.of("create") == [(SOURCE, "probe.cu", (), ())]
    assert len(fake.of("destroy")) == 1
    (file,) = cache.iterdir()
    assert fake.of("load") == [(str(file),)] * 3
    assert file.read_bytes() == b"machine code\0"


def test_the_cache_outlives_the_process_but_no_other_compiler(fake: FakeCupy, cache: Path) -> None:
    path = nvrtc.cubin_file(SOURCE, "probe", "sm_90")
    nvrtc.nvrtc_version.cache_clear()
    assert nvrtc.cubin_file(SOURCE, "probe", "sm_90") == path
    assert len(fake.of("compile")) == 1
    others = {nvrtc.cubin_file(SOURCE, "probe", "sm_80")}
    others.add(nvrtc.cubin_file(SOURCE + " ", "probe", "sm_90"))
    fake.nvrtc = (13, 1)
    nvrtc.nvrtc_version.cache_clear()
    others.add(nvrtc.cubin_file(SOURCE, "probe", "sm_90"))
    assert len(others | {path}) == len(list(cache.iterdir())) == 4


def test_a_damaged_file_is_built_anew_once(fake: FakeCupy) -> None:
    fake.broken = {0}
    cupy_driver().module(SOURCE, "probe", 512, DEVICE)
    assert len(fake.of("compile")) == len(fake.of("load")) == 2


def test_code_that_cannot_be_loaded_is_an_error(fake: FakeCupy) -> None:
    fake.broken = {0, 1}
    with pytest.raises(BackendError, match=r"sm_90 but cannot be loaded: CUDA_ERROR_INVALID_IMAGE"):
        cupy_driver().module(SOURCE, "probe", 512, DEVICE)


def test_a_refused_source_is_an_error_with_the_start_of_the_log(fake: FakeCupy) -> None:
    fake.compile_error = "x" * 4000 + "y"
    with pytest.raises(KernelCompileError) as caught:
        cupy_driver().module(SOURCE, "probe", 512, DEVICE)
    message = str(caught.value)
    assert "could not compile probe for sm_90 (NVRTC_ERROR_COMPILATION (6))" in message
    assert message.endswith("x" * 4000)
    assert len(fake.of("destroy")) == 1


def test_a_cache_that_cannot_be_written_is_an_error(
    fake: FakeCupy, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(once.os, "replace", full)
    with pytest.raises(KernelCompileError, match=r"No space left on device; .* OPTFACTORY_CACHE"):
        nvrtc.cubin_file(SOURCE, "probe", "sm_90")
    assert not list(cache.iterdir())


@pytest.mark.parametrize(
    ("capability", "architecture"), [((9, 0), "sm_90"), ((8, 7), "sm_86"), ((10, 3), "sm_100")]
)
def test_code_is_for_the_devices_own_generation(
    fake: FakeCupy, capability: tuple[int, int], architecture: str
) -> None:
    fake.capability = capability
    assert nvrtc.architecture_of(DEVICE) == architecture


@pytest.mark.parametrize(
    ("capability", "remedy"),
    [
        ((7, 0), "install a torch built for an earlier CUDA"),
        ((12, 0), 'pip install -U "optfactory[cuda13]"'),
    ],
)
def test_a_device_that_the_compiler_does_not_know(
    fake: FakeCupy, capability: tuple[int, int], remedy: str
) -> None:
    fake.capability = capability
    with pytest.raises(BackendError) as caught:
        cupy_driver().module(SOURCE, "probe", 512, DEVICE)
    message = str(caught.value)
    assert f"NVIDIA Test has compute capability {capability[0]}.{capability[1]}" in message
    assert "NVRTC 13.0 compiles for 75, 80" in message
    assert remedy in message


# ---- launching -------------------------------------------------------------------------------


def test_arguments_are_passed_by_value_to_blocks_of_the_modules_threads(fake: FakeCupy) -> None:
    bucket = np.zeros(1, dtype=np.dtype([("p", np.uint64), ("n", np.int64, (500,))]))
    count = np.array([3], dtype=np.int32)
    module = cupy_driver().module(SOURCE, "probe", 512, DEVICE)
    module.launch("f", 264, [bucket, count])
    module.launch("f", 1, [])
    first, second = fake.of("launch")
    assert first[:3] == ("f", (264,), (512,))
    assert [given is sent for given, sent in zip(first[3], (bucket, count), strict=True)] == [
        True
    ] * 2
    assert second == ("f", (1,), (512,), ())
    assert fake.of("get_function") == [("f",)]


def test_everything_runs_on_the_device_and_torchs_stream(fake: FakeCupy) -> None:
    driver = cupy_driver()
    fake.stream = 4711
    with driver.on(DEVICE):
        entered = [event for event in fake.events if event[0].startswith("enter")]
        assert entered == [
            ("enter torch device", DEVICE),
            ("enter cupy device", 1),
            ("enter stream", 4711),
        ]
    left = [event[0] for event in fake.events if event[0].startswith("exit")]
    assert left == ["exit stream", "exit cupy device", "exit torch device"]


def test_streams_are_wrapped_once_and_the_default_one_explicitly(fake: FakeCupy) -> None:
    driver = cupy_driver()
    for stream in (0, 4711, 0, 4711):
        fake.stream = stream
        with driver.on(DEVICE):
            pass
    assert fake.of("wrap stream") == [(0, 1), (0, 4711)]
    assert fake.of("enter stream") == [(1,), (4711,), (1,), (4711,)]


def test_the_grid_and_the_capture_are_the_devices(fake: FakeCupy) -> None:
    driver = cupy_driver()
    assert driver.resident_blocks(DEVICE) == 264
    assert driver.capturing(DEVICE)
    assert fake.of("enter torch device") == [(DEVICE,)]
