"""Compiled kernels: cached once, in a private folder, and never in the way of training."""

from __future__ import annotations

import concurrent.futures
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from optfactory import resolve
from optfactory.build import compiler
from optfactory.build.compiler import compile_library, find_compiler
from optfactory.errors import KernelCompileError
from optfactory.rules.codegen import KernelVariant, cpp_source
from tests.unit.harness import SOURCE, answer, needs_compiler, programs, step

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


# ---- the cache -----------------------------------------------------------------------------


@needs_compiler
def test_a_source_is_compiled_once(cache: Path, calls: Path) -> None:
    first = compile_library(SOURCE, "probe")
    assert answer(first) == 42
    assert len(calls.read_text().splitlines()) == 1
    facts = first.stat()
    assert compile_library(SOURCE, "probe") == first
    assert len(calls.read_text().splitlines()) == 1
    assert first.stat().st_mtime_ns == facts.st_mtime_ns
    assert [file.name for file in cache.iterdir()] == [first.name]
    assert first.name.startswith("probe-")


@needs_compiler
def test_another_source_compiler_or_flag_is_another_library(
    cache: Path, calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    libraries = {compile_library(SOURCE, "probe")}
    libraries.add(compile_library(SOURCE.replace("42", "43"), "probe"))
    monkeypatch.setenv("CXX", f"{os.environ['CXX']} -DUNUSED")
    libraries.add(compile_library(SOURCE, "probe"))
    script = Path(os.environ["CXX"].split()[0])
    script.write_text(script.read_text() + "# a newer version\n")
    libraries.add(compile_library(SOURCE, "probe"))
    monkeypatch.setattr(compiler, "_processor", lambda: "another processor")
    libraries.add(compile_library(SOURCE, "probe"))
    assert len(libraries) == 5
    assert len(list(cache.iterdir())) == 5


STEP = """
import sys, torch
from optfactory import build_optimizer
p = torch.ones(300).requires_grad_()
optimizer = build_optimizer("adam", [p], lr=0.5)
p.grad = torch.ones(300)
optimizer.step()
assert torch.allclose(p, torch.tensor(0.5)), p
"""


@needs_compiler
@pytest.mark.usefixtures("no_backends_yet")
def test_a_second_process_uses_the_first_ones_kernels(
    cache: Path, calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPTFACTORY_BACKEND", "auto")
    step()
    assert len(calls.read_text().splitlines()) == 1
    command = [sys.executable, "-W", "error", "-c", STEP]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert len(calls.read_text().splitlines()) == 1
    assert len(list(cache.iterdir())) == 1


@needs_compiler
def test_several_processes_may_compile_the_same_kernel_at_once(cache: Path) -> None:
    command = [
        sys.executable, "-c",
        "import sys, time, ctypes; from optfactory.build.compiler import compile_library\n"
        "time.sleep(max(0, float(sys.argv[2]) - time.time()))\n"
        "print(ctypes.CDLL(str(compile_library(sys.argv[1], 'probe'))).answer())",
        SOURCE, str(time.time() + 1.0),
    ]  # fmt: skip
    runs = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
        )
        for _ in range(4)
    ]
    for run in runs:
        output, errors = run.communicate()
        assert output.strip() == "42", errors
    assert [file.suffix for file in cache.iterdir()] == [".so"]


@needs_compiler
def test_several_threads_may_compile_the_same_kernel_at_once(cache: Path) -> None:
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = set(pool.map(lambda _: compile_library(SOURCE, "probe"), range(8)))
    assert len(found) == 1
    assert answer(found.pop()) == 42
    assert len(list(cache.iterdir())) == 1


@needs_compiler
@pytest.mark.usefixtures("no_backends_yet")
def test_a_broken_library_in_the_cache_is_replaced_or_an_error_that_names_it(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = resolve("adam").rule(resolve("adam").model_dump())
    variant = KernelVariant(rule, "float", "float", ("float32",) * len(rule.states), block_size=256)
    library = compile_library(cpp_source(variant), "adam-float-float-32bit")
    whole = library.read_bytes()
    library.write_bytes(whole[:100])  # as a full disk may leave it
    monkeypatch.setenv("OPTFACTORY_BACKEND", "cpu")
    try:
        step()
    except KernelCompileError as error:
        message = str(error)
    else:
        message = ""
        assert library.read_bytes() == whole
    assert not message or str(library) in message


# ---- whose folder it is --------------------------------------------------------------------


@needs_compiler
def test_the_folder_is_made_for_its_owner_alone(cache: Path) -> None:
    before = os.umask(0)
    try:
        compile_library(SOURCE, "probe")
    finally:
        os.umask(before)
    facts = cache.stat()
    assert stat.S_IMODE(facts.st_mode) == 0o700
    assert facts.st_uid == os.getuid()


@needs_compiler
@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o1777, 0o720, 0o702])
def test_a_folder_others_can_write_to_is_refused(cache: Path, mode: int) -> None:
    cache.mkdir()
    cache.chmod(mode)
    with pytest.raises(KernelCompileError, match="OPTFACTORY_CACHE") as caught:
        compile_library(SOURCE, "probe")
    assert str(cache) in str(caught.value)
    assert "others" in str(caught.value)
    assert list(cache.iterdir()) == []


@needs_compiler
@pytest.mark.parametrize("mode", [0o700, 0o755])
def test_a_folder_others_can_only_read_is_used(cache: Path, mode: int) -> None:
    cache.mkdir()
    cache.chmod(mode)
    assert answer(compile_library(SOURCE, "probe")) == 42


@needs_compiler
def test_a_folder_of_another_user_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir(mode=0o700)
    monkeypatch.setattr(os, "getuid", lambda: cache.stat().st_uid + 1)
    with pytest.raises(KernelCompileError, match="others"):
        compile_library(SOURCE, "probe")
    assert list(cache.iterdir()) == []


@needs_compiler
def test_a_library_planted_in_a_foreign_folder_is_not_loaded(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = compile_library(SOURCE, "probe")
    cache.chmod(0o777)
    assert planted.is_file()
    with pytest.raises(KernelCompileError):
        compile_library(SOURCE, "probe")


@needs_compiler
@pytest.mark.parametrize("kind", ["file", "below a file"])
def test_a_chosen_folder_that_is_none_is_an_error(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("OPTFACTORY_CACHE", str(file if kind == "file" else file / "below"))
    with pytest.raises(KernelCompileError, match="OPTFACTORY_CACHE"):
        compile_library(SOURCE, "probe")


# ---- which compiler ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        (["c++", "g++", "clang++"], ["c++"]),
        (["g++", "clang++"], ["g++"]),
        (["clang++"], ["clang++"]),
        ([], None),
        (["gcc", "cc"], None),
    ],
)
def test_the_first_compiler_on_the_path_is_taken(
    there: list[str], expected: list[str] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", programs(tmp_path / "bin", *there))
    assert find_compiler() == expected


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ("g++", ["g++"]),
        ("ccache g++ -v", ["ccache", "g++", "-v"]),
        ("'{folder}/my g++' -v", ["{folder}/my g++", "-v"]),
        ("not-there", None),
        ("", ["c++"]),
        ("  ", ["c++"]),
    ],
)
def test_cxx_names_the_compiler_and_its_arguments(
    named: str, expected: list[str] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = programs(tmp_path / "bin", "c++", "g++", "ccache", "my g++")
    monkeypatch.setenv("PATH", folder)
    monkeypatch.setenv("CXX", named.format(folder=folder))
    wanted = expected and [word.format(folder=folder) for word in expected]
    assert find_compiler() == wanted


@needs_compiler
def test_the_compiler_that_cxx_names_does_the_work(cache: Path, calls: Path) -> None:
    compile_library(SOURCE, "probe")
    (line,) = calls.read_text().splitlines()
    assert "-std=c++17" in line
    assert "-ffast-math" not in line
    assert "-ffp-contract=off" in line
