"""What a compiler lacks is left out, named, and told from a kernel that it failed to build."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from optfactory.build import flags
from optfactory.build.compiler import compile_library, find_compiler, load_library
from optfactory.errors import BrokenCompilerError, KernelCompileError
from tests.unit.harness import SOURCE, answer, needs_compiler, without

pytestmark = needs_compiler


def failing_once(folder: Path, *, at: str) -> str:
    """A command for CXX: a compiler that is killed at its first file of that name."""
    script, mark = folder / "c++", folder / "failed"
    real = " ".join(find_compiler() or ["c++"])
    script.write_text(
        f"""#!/bin/sh
case "$*" in *{at}*) [ -e {mark} ] || {{ touch {mark}; kill -9 $$; }};; esac
exec {real} "$@"
"""
    )
    script.chmod(0o700)
    return str(script)


@pytest.mark.parametrize("flag", ["-fopenmp", "-march=native"])
def test_a_flag_that_is_refused_is_left_out_with_one_warning_and_another_name(
    flag: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", without(flag, tmp_path))
    with pytest.warns(UserWarning, match=f"does not take {flag}:.* CXX"):
        library = compile_library(SOURCE, "adam")
    assert compile_library(SOURCE, "adam") == library  # a second warning would be an error
    compile_library(SOURCE.replace("42", "43"), "adam")
    assert answer(library) == 42
    assert library.name.startswith("adam-degraded-")
    assert {file.suffix for file in cache.iterdir()} == {".so"}


def test_everything_that_can_be_refused_may_be(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = " ".join(find_compiler() or ["c++"])
    script = tmp_path / "simple-c++"
    refuse = 'case "$*" in *-march*|*-mprefer*|*-fopenmp*) echo "unknown flag" >&2; exit 1;; esac'
    script.write_text(f'#!/bin/sh\n{refuse}\nexec {real} "$@"\n')
    script.chmod(0o700)
    monkeypatch.setenv("CXX", str(script))
    with pytest.warns(UserWarning, match=r"does not take -march=native .*-fopenmp"):
        library = compile_library(SOURCE, "adam")
    assert answer(library) == 42


def test_a_compiler_that_got_what_it_lacked_builds_good_kernels_again(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = without("-fopenmp", tmp_path)
    monkeypatch.setenv("CXX", command)
    with pytest.warns(UserWarning, match="-fopenmp"):
        degraded = compile_library(SOURCE, "adam")
    script = Path(command)
    script.write_text(script.read_text().replace("no -fopenmp", "").replace("exit 1", ":"))
    monkeypatch.setattr(flags, "_known", {})  # as in a later process
    good = compile_library(SOURCE, "adam")
    assert good != degraded
    assert "degraded" not in good.name


@pytest.mark.parametrize("at", ["kernel.cpp", "probe.cpp"])
def test_a_failure_that_passes_makes_no_slow_kernel(
    at: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", failing_once(tmp_path, at=at))
    if at == "kernel.cpp":
        with pytest.raises(KernelCompileError, match="ended by signal 9") as caught:
            compile_library(SOURCE, "adam")
        assert not isinstance(caught.value, BrokenCompilerError)
        assert list(cache.iterdir()) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        library = compile_library(SOURCE, "adam")
    assert answer(library) == 42
    assert [file.name for file in cache.iterdir()] == [library.name]
    assert "degraded" not in library.name


def test_a_kernel_that_does_not_compile_has_its_errors_from_the_first_one_on(cache: Path) -> None:
    source = "".join(f"int f{i}() {{ return missing{i}; }}\n" for i in range(200))
    with pytest.raises(KernelCompileError, match="missing0") as caught:
        compile_library(source, "adam")
    assert "missing20;" in str(caught.value)
    assert not isinstance(caught.value, BrokenCompilerError)


def test_a_forced_set_is_never_left_out(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forced = flags.wanted_flags()[:1]
    monkeypatch.setattr(flags, "_needed_flags", lambda: forced)
    monkeypatch.setattr(flags, "wanted_flags", lambda: (*forced, "-fopenmp"))
    monkeypatch.setenv("CXX", without(forced[0], tmp_path))
    with pytest.raises(BrokenCompilerError, match=f"no {forced[0]}"):
        flags.usable_flags([without(forced[0], tmp_path)], flags.wanted_flags(), tmp_path)


def test_a_compiler_whose_libraries_cannot_be_loaded_is_broken(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "cross-c++"
    script.write_text('#!/bin/sh\nfor word; do out="$word"; done\necho nothing > "$out"\n')
    script.chmod(0o700)
    monkeypatch.setenv("CXX", str(script))
    with pytest.raises(BrokenCompilerError, match=r"cannot be loaded.*CXX"):
        load_library(SOURCE, "adam")
