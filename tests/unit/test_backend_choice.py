"""Which backend runs, and what happens where kernels cannot be compiled."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from optfactory import build_optimizer
from optfactory.backends import backend_for
from optfactory.backends.cpu import backend as cpu
from optfactory.build.compiler import compile_library
from optfactory.errors import ConfigError, KernelCompileError, OptFactoryError
from tests.conftest import has_compiler
from tests.unit.harness import needs_compiler, programs, step

CPU = torch.device("cpu")


# ---- when it does not work -----------------------------------------------------------------


@needs_compiler
def test_a_source_that_does_not_compile_shows_what_the_compiler_said(cache: Path) -> None:
    with pytest.raises(KernelCompileError) as caught:
        compile_library("int main( { this is no program; }\n", "probe")
    message = str(caught.value)
    assert "probe" in message
    assert "error" in message
    assert "kernel.cpp" in message
    assert "OPTFACTORY_BACKEND=reference" in message
    assert isinstance(caught.value, OptFactoryError)
    assert isinstance(caught.value, RuntimeError)
    assert list(cache.iterdir()) == []


@pytest.fixture
def failing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler named by CXX that builds nothing."""
    script = tmp_path / "failing-c++"
    script.write_text("#!/bin/sh\necho 'out of ideas' >&2\nexit 1\n")
    script.chmod(0o700)
    monkeypatch.setenv("CXX", str(script))
    return script


@pytest.mark.usefixtures("cache", "no_backends_yet")
def test_a_compiler_that_fails_stops_whoever_insists_on_it_before_anything_changes(
    failing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPTFACTORY_BACKEND", "cpu")
    p, q = torch.ones(300).requires_grad_(), torch.ones(4096).requires_grad_()
    optimizer = build_optimizer("adam8bit", [p, q])
    for parameter in (p, q):
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(KernelCompileError, match="out of ideas") as caught:
        optimizer.step()
    assert "OPTFACTORY_BACKEND=reference" in str(caught.value)
    assert str(failing) in str(caught.value)
    for parameter in (p, q):
        assert (parameter == 1).all()
        assert optimizer.state[parameter].get("step", 0) == 0
    monkeypatch.setenv("OPTFACTORY_BACKEND", "reference")
    optimizer.step()
    assert optimizer.state[p]["step"] == 1


@pytest.mark.usefixtures("no_backends_yet")
def test_a_compiler_that_fails_is_warned_of_once_and_training_goes_on(
    cache: Path, failing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPTFACTORY_BACKEND", "auto")
    monkeypatch.setenv("OPTFACTORY_INSTRUCTIONS", "native")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for dtype in (torch.float32, torch.float32, torch.bfloat16):
            p = torch.ones(300, dtype=dtype).requires_grad_()
            optimizer = build_optimizer("adam", [p], lr=0.5, master_weights="none")
            for _ in range(2):
                p.grad = torch.ones(300, dtype=dtype)
                optimizer.step()
            assert torch.allclose(p.float(), torch.tensor(0.0), atol=1e-2)
    (warning,) = seen
    for word in (str(failing), "out of ideas", "CXX", "plain torch operations", "doctor"):
        assert word in str(warning.message)
    assert list(cache.iterdir()) == []


@needs_compiler
@pytest.mark.usefixtures("cache", "no_backends_yet")
def test_a_kernel_that_a_good_compiler_refuses_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPTFACTORY_BACKEND", "auto")
    monkeypatch.setattr(cpu, "cpp_source", lambda variant: "no program")
    with pytest.raises(KernelCompileError, match="could not compile"):
        step()


@pytest.mark.usefixtures("no_backends_yet")
def test_without_a_compiler_one_warning_names_the_remedy_and_training_goes_on(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("OPTFACTORY_BACKEND", raising=False)
    monkeypatch.setenv("PATH", programs(tmp_path / "bin"))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            step()
        assert backend_for(CPU).name == "reference"
    assert not cache.exists()
    assert len(seen) == 1
    message = str(seen[0].message)
    assert seen[0].category is UserWarning
    for word in ("no C++ compiler", "g++", "CXX"):
        assert word in message


@pytest.mark.usefixtures("no_backends_yet")
def test_insisting_on_kernels_without_a_compiler_is_an_error(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "not-there")
    monkeypatch.setenv("OPTFACTORY_BACKEND", "cpu")
    with pytest.raises(KernelCompileError, match="no C\\+\\+ compiler") as caught:
        step()
    for word in ("CXX", "g++", "OPTFACTORY_BACKEND=reference"):
        assert word in str(caught.value)


# ---- the choice of a backend ---------------------------------------------------------------


@pytest.mark.parametrize("value", ["cuda", "CPU", "", "native", "auto "])
def test_an_unknown_backend_is_refused_with_what_is_allowed(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPTFACTORY_BACKEND", value)
    p = torch.ones(3).requires_grad_()
    optimizer = build_optimizer("adam", [p])
    p.grad = torch.ones(3)
    with pytest.raises(ConfigError, match="OPTFACTORY_BACKEND") as caught:
        optimizer.step()
    for word in (repr(value), "auto", "cpu", "reference"):
        assert word in str(caught.value)
    assert (p == 1).all()
    assert optimizer.state[p].get("step", 0) == 0


@pytest.mark.usefixtures("no_backends_yet")
@pytest.mark.parametrize(
    ("value", "name"), [("reference", "reference"), ("cpu", "cpu"), ("auto", "cpu"), (None, "cpu")]
)
def test_the_variable_chooses_the_backend(
    value: str | None, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "cpu" and not has_compiler():
        pytest.skip("no C++ compiler")
    if value is None:
        monkeypatch.delenv("OPTFACTORY_BACKEND", raising=False)
    else:
        monkeypatch.setenv("OPTFACTORY_BACKEND", value)
    assert backend_for(CPU).name == name
    step()


@pytest.mark.usefixtures("no_backends_yet")
def test_a_device_without_kernels_warns_once_and_takes_the_portable_backend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPTFACTORY_BACKEND", "auto")
    with pytest.warns(UserWarning, match="'meta'"):
        first = backend_for(torch.device("meta"))
    assert first.name == "reference"
    assert backend_for(torch.device("meta")) is first  # a second warning would be an error
