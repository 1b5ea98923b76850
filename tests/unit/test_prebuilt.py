"""Prebuilt kernels: which one is loaded, and what happens where there is none."""

from __future__ import annotations

import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from optfactory import build_optimizer, resolve
from optfactory.backends import backend_for
from optfactory.backends.cpu.backend import CpuBackend
from optfactory.backends.reference.backend import ReferenceBackend
from optfactory.build import compiler, prebuilt, processor
from optfactory.build.compiler import compile_library, find_compiler
from optfactory.build.processor import INSTRUCTION_SETS, InstructionSet
from optfactory.errors import BackendError, ConfigError, NoCompilerError
from optfactory.rules.codegen import KernelVariant, cpp_source
from tests.unit import harness
from tests.unit.harness import needs_compiler, programs, step

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
SOURCE = "the text of a kernel"
BEST, GOOD, *_, LEAST = (target for target in INSTRUCTION_SETS if target.machine == "x86_64")

pytestmark = needs_compiler


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of prebuilt kernels, and a processor that has all of x86-64's sets."""
    monkeypatch.setattr(prebuilt, "FOLDER", tmp_path / "prebuilt")
    monkeypatch.setattr(processor, "own_sets", lambda: [BEST, GOOD, LEAST])
    monkeypatch.setattr(processor, "_common_features", lambda text: BEST.features)
    monkeypatch.delenv("OPTFACTORY_INSTRUCTIONS", raising=False)
    return tmp_path / "prebuilt"


def add(folder: Path, target: InstructionSet, answer: int, source: str = SOURCE) -> Path:
    """Puts a library where the kernel of a source belongs; it tells which one it is."""
    path = folder / prebuilt.relative_path(source, "probe", target)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = f'extern "C" int answer() {{ return {answer}; }}\n'
    shutil.copy(compile_library(text, "probe"), path)
    return path


def loaded() -> int | None:
    library = prebuilt.load(SOURCE, "probe")
    return None if library is None else library.answer()


# ---- which one -------------------------------------------------------------------------------


def test_the_best_kernel_that_is_there_is_loaded(folder):
    assert loaded() is None
    assert not prebuilt.available()
    add(folder, LEAST, 2)
    assert loaded() == 2
    assert prebuilt.available()
    add(folder, BEST, 4)
    add(folder, GOOD, 3)
    assert loaded() == 4


def test_a_kernel_for_another_processor_is_not_loaded(folder, monkeypatch):
    monkeypatch.setattr(processor, "_common_features", lambda text: GOOD.features)
    add(folder, BEST, 4)
    assert not prebuilt.available()
    assert loaded() is None
    add(folder, LEAST, 2)
    assert prebuilt.available()
    assert loaded() == 2


def test_the_variable_forces_one_or_none(folder, monkeypatch):
    for answer, target in enumerate((LEAST, GOOD, BEST), start=2):
        add(folder, target, answer)
    for value, answer in (("auto", 4), (GOOD.name, 3), (LEAST.name, 2), ("native", None)):
        monkeypatch.setenv("OPTFACTORY_INSTRUCTIONS", value)
        assert loaded() == answer
        assert prebuilt.available() == (answer is not None)
    (folder / prebuilt.relative_path(SOURCE, "probe", LEAST)).unlink()
    monkeypatch.setenv("OPTFACTORY_INSTRUCTIONS", LEAST.name)
    assert loaded() is None


def test_a_kernel_of_another_source_or_other_flags_is_never_loaded(folder, monkeypatch):
    add(folder, GOOD, 3)
    assert loaded() == 3
    assert prebuilt.load(SOURCE + " ", "probe") is None
    with monkeypatch.context() as patch:
        patch.setattr(prebuilt, "FLAGS", (*prebuilt.FLAGS, "-ffast-math"))
        assert loaded() is None
    other = InstructionSet(GOOD.name, GOOD.machine, GOOD.features, (*GOOD.flags, "-mno-fma"))
    monkeypatch.setattr(processor, "own_sets", lambda: [BEST, other, LEAST])
    assert loaded() is None


def test_a_damaged_kernel_is_named_and_not_loaded(folder):
    path = add(folder, BEST, 4)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.warns(UserWarning, match="cannot be loaded") as caught:
        assert loaded() is None
    assert str(path) in str(caught[0].message)
    assert "Reinstall" in str(caught[0].message)


# ---- in the place of compiled ones -----------------------------------------------------------


def adam_source() -> tuple[str, str]:
    config = resolve("adam")
    rule = config.rule(config.model_dump())
    variant = KernelVariant(rule, "float", "float", ("float32",) * len(rule.states), block_size=256)
    return cpp_source(variant), variant.label


@pytest.fixture
def with_adam(folder: Path, monkeypatch: pytest.MonkeyPatch, no_backends_yet: None) -> Path:
    """The kernel of `step` is prebuilt; there is no other."""
    source, label = adam_source()
    path = folder / prebuilt.relative_path(source, label, BEST)
    path.parent.mkdir(parents=True)
    shutil.copy(compile_library(source, label), path)
    monkeypatch.delenv("OPTFACTORY_BACKEND", raising=False)
    return path


@pytest.fixture
def no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", programs(tmp_path / "bin"))


def test_a_compiler_is_not_asked_for_what_is_prebuilt(with_adam, cache):
    step()
    assert backend_for(CPU).name == "cpu"
    assert not cache.exists()


def test_a_compiler_builds_what_is_damaged(with_adam, cache):
    with_adam.write_bytes(b"")
    with pytest.warns(UserWarning, match="cannot be loaded"):
        step()
    assert len(list(cache.iterdir())) == 1


def test_without_a_compiler_what_is_prebuilt_runs_silently(with_adam, no_compiler, cache):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step()
    assert backend_for(CPU).name == "cpu"
    assert not cache.exists()


def mixed_step() -> list[torch.Tensor]:
    """Two steps of one optimizer with three kernels."""
    generator = torch.Generator().manual_seed(1)
    parameters = [torch.randn(300, generator=generator).requires_grad_() for _ in range(3)]
    parameters[2] = parameters[2].detach().bfloat16().requires_grad_()
    first, *others = parameters
    groups = [{"params": [first]}, {"params": others, "maximize": True}]
    optimizer = build_optimizer("adam", groups, lr=0.5, master_weights="none")
    for _ in range(2):
        for p in parameters:
            p.grad = torch.randn(300, generator=generator).to(p.dtype)
        optimizer.step()
    return [p.detach() for p in parameters]


def test_without_a_compiler_buckets_run_where_they_can(with_adam, no_compiler, cache, monkeypatch):
    monkeypatch.setenv("OPTFACTORY_BACKEND", "reference")
    expected = mixed_step()
    monkeypatch.setenv("OPTFACTORY_BACKEND", "auto")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        got = mixed_step()
        mixed_step()
    torch.testing.assert_close(got[0], expected[0])  # multiply-adds round once in kernels
    assert torch.equal(got[1], expected[1])
    assert torch.equal(got[2], expected[2])
    assert len(seen) == 2
    for item, dtype in zip(seen, ("float32", "bfloat16"), strict=True):
        assert item.category is UserWarning
        for word in ("no prebuilt kernel", f"torch.{dtype} parameters", "maximizes: True", "g++"):
            assert word in str(item.message)
    assert not cache.exists()


def test_both_backends_of_such_a_step_want_their_gradients_alike():
    # The optimizer asks once per device whether it has to divide gradients by a scaler's factor.
    assert CpuBackend.divides_gradients == ReferenceBackend.divides_gradients


def test_insisting_on_kernels_without_a_compiler_changes_nothing(
    with_adam, no_compiler, cache, monkeypatch
):
    monkeypatch.setenv("OPTFACTORY_BACKEND", "cpu")
    step()
    p, q = torch.ones(300).requires_grad_(), torch.ones(300).bfloat16().requires_grad_()
    optimizer = build_optimizer("adam", [p, q])
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    with pytest.raises(NoCompilerError, match="bfloat16"):
        optimizer.step()
    assert (p == 1).all()
    assert (q == 1).all()
    assert optimizer.state[p]["step"] == optimizer.state[q]["step"] == 0


@pytest.mark.parametrize(("value", "error"), [("avx2", ConfigError), (BEST.name, BackendError)])
def test_a_bad_choice_of_instructions_changes_nothing(value, error, with_adam, cache, monkeypatch):
    monkeypatch.setattr(processor, "_common_features", lambda text: GOOD.features)
    monkeypatch.setenv("OPTFACTORY_INSTRUCTIONS", value)
    p = torch.ones(300).requires_grad_()
    optimizer = build_optimizer("adam", [p])
    p.grad = torch.ones(300)
    with pytest.raises(error, match="OPTFACTORY_INSTRUCTIONS"):
        optimizer.step()
    assert (p == 1).all()
    assert optimizer.state[p]["step"] == 0
    assert not cache.exists()


def test_compilers_are_told_the_forced_set(cache, calls, monkeypatch):
    forced = next(target for target in INSTRUCTION_SETS if target in compiler_sets())
    monkeypatch.setattr(processor, "own_sets", lambda: [forced])
    monkeypatch.setattr(processor, "_common_features", lambda text: forced.features)
    native = compile_library(harness.SOURCE, "probe")
    monkeypatch.setenv("OPTFACTORY_INSTRUCTIONS", forced.name)
    assert compile_library(harness.SOURCE, "probe") != native
    first, second = calls.read_text().splitlines()
    assert "-march=native" in first
    assert "-march=native" not in second
    assert set(forced.flags) <= set(second.split())


def compiler_sets() -> list[InstructionSet]:
    """The sets for the machine that the tests really run on."""
    return [t for t in INSTRUCTION_SETS if t.machine == compiler.platform.machine()]


# ---- the OpenMP runtime ----------------------------------------------------------------------

# A runtime that another library brought, invisible to others, is the one that kernels find.
SHARE = """
import ctypes, sys
from optfactory.build import prebuilt

assert "torch" not in sys.modules
assert not hasattr(ctypes.CDLL(None), "GOMP_parallel")
brought = ctypes.CDLL(sys.argv[1])
kernel = prebuilt._load(sys.argv[2])
assert kernel.runs_on() == brought.GOMP_parallel() == 7
"""


def test_kernels_run_on_the_runtime_that_is_there_whatever_its_name(tmp_path):
    runtime = tmp_path / "torch.libs" / "libgomp-a34b3233.so.1.0.0"
    kernel = tmp_path / "kernel.so"
    runtime.parent.mkdir()
    texts = {
        runtime: "int GOMP_parallel() { return 7; }",
        kernel: "int GOMP_parallel(); int runs_on() { return GOMP_parallel(); }",
    }
    for path, text in texts.items():
        text = f'extern "C" {{ {text} }}'
        command = [*find_compiler(), "-shared", "-fPIC", "-x", "c++", "-", "-o", str(path)]
        subprocess.run(command, input=text, text=True, check=True)
    run = [sys.executable, "-c", SHARE, str(runtime), str(kernel)]
    done = subprocess.run(run, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
