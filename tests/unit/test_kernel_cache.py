"""The kernel cache: what many processes build at once, and what killed ones leave."""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from optfactory.build import once
from optfactory.build.compiler import compile_library, find_compiler
from optfactory.errors import KernelCompileError
from tests.unit.harness import SOURCE, answer, needs_compiler

ROOT = Path(__file__).resolve().parents[2]
COMPILE = """
import signal, sys
from optfactory.build.compiler import compile_library
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it
print(compile_library(sys.argv[1], "probe"))
"""
LIMIT = 60.0  # seconds until a wait has failed

pytestmark = needs_compiler


def slow_compiler(folder: Path) -> str:
    """A command for CXX: a compiler that waits with kernels until a file `go` is there."""
    script, go = folder / "slow-c++", folder / "go"
    real = " ".join(find_compiler() or ["c++"])
    script.write_text(
        f"""#!/bin/sh
case "$*" in *kernel.cpp*) while [ ! -e {go} ]; do sleep 0.05; done;; esac
exec {real} "$@"
"""
    )
    script.chmod(0o700)
    return str(script)


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts processes, each with a group of its own, that compile a source."""
    runs = []

    def run(source: str = SOURCE) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", COMPILE, source],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        runs.append(process)
        return process

    yield run
    for process in runs:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=LIMIT)


def wait_for_builds(folder: Path, count: int = 1) -> None:
    """Until so many kernels are being built."""
    until = time.monotonic() + LIMIT
    while len(list(folder.glob("build-*/kernel.cpp"))) < count:
        assert time.monotonic() < until, "nothing was built"
        time.sleep(0.02)


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


# ---- built once ------------------------------------------------------------------------------


def test_of_several_processes_one_compiles_and_the_others_wait(
    start: Start, cache: Path, calls: Path
) -> None:
    runs = [start() for _ in range(4)]
    outputs = {run.communicate(timeout=LIMIT)[0] for run in runs}
    assert [run.returncode for run in runs] == [0] * 4
    assert len(outputs) == 1
    assert len(calls.read_text().splitlines()) == 1
    assert {file.suffix for file in cache.iterdir()} == {".so"}


def test_each_kernel_that_is_compiled_is_logged_with_its_name_and_seconds(
    cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="optfactory")
    library = compile_library(SOURCE, "probe")
    compile_library(SOURCE, "probe")
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("optfactory", "INFO")
    assert record.getMessage().startswith(f"compiled the kernel {library.name} in ")
    assert record.getMessage().endswith(" s")


@pytest.mark.parametrize("error", [OSError(95, "not supported"), BlockingIOError()])
def test_without_locks_kernels_are_compiled_all_the_same(
    error: OSError, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(handle: int) -> None:
        raise error

    monkeypatch.setattr(once, "_flock", refuse)
    monkeypatch.setattr(once, "_PATIENCE", 0.1)  # another process may have stopped with the lock
    library = compile_library(SOURCE, "probe")
    assert answer(library) == 42
    assert names(cache) - {f"{library.stem}.lock"} == {library.name}


def test_a_fork_does_not_keep_the_locks_of_its_parent(cache: Path) -> None:
    cache.mkdir(mode=0o700)
    target = cache / "probe.so"
    with once.building(target):
        child = os.fork()
        if child == 0:
            os._exit(0 if not once._held else 1)
        assert once._held
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        with open(target.with_suffix(".lock")) as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert names(cache) == set()
    assert not once._held


# ---- killed builds ---------------------------------------------------------------------------


def test_a_killed_build_is_cleared_away_by_the_next_one(
    start: Start, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", slow_compiler(tmp_path))
    killed, alive = start(), start(SOURCE.replace("42", "43"))
    wait_for_builds(cache, 2)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate(timeout=LIMIT)
    assert len(list(cache.glob("build-*"))) == 2
    third = compile_in_process_of_its_own(SOURCE.replace("42", "44"), monkeypatch)
    (left,) = cache.glob("build-*")  # that of the living process
    assert left.is_dir()
    (tmp_path / "go").touch()
    output, errors = alive.communicate(timeout=LIMIT)
    assert alive.returncode == 0, errors
    assert names(cache) == {third.name, Path(output.strip()).name}


def compile_in_process_of_its_own(source: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With the compiler that does not wait."""
    with monkeypatch.context() as patch:
        patch.delenv("CXX")
        return compile_library(source, "probe")


def test_the_same_kernel_clears_away_what_a_killed_build_of_it_left(
    start: Start, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", slow_compiler(tmp_path))
    killed = start()
    wait_for_builds(cache)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate(timeout=LIMIT)
    (tmp_path / "go").touch()
    library = compile_library(SOURCE, "probe")
    assert names(cache) == {library.name}


def test_ctrl_c_leaves_nothing_and_makes_no_slow_kernel(
    start: Start, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", slow_compiler(tmp_path))
    run = start()
    wait_for_builds(cache)
    os.killpg(run.pid, signal.SIGINT)
    _, errors = run.communicate(timeout=LIMIT)
    assert "KeyboardInterrupt" in errors
    assert names(cache) == set()


@pytest.mark.parametrize(("hours", "kept"), [(1, True), (48, False)])
def test_build_folders_that_tell_nothing_are_kept_for_a_day(
    hours: int, kept: bool, cache: Path
) -> None:
    foreign = cache / "build-abcdefgh"
    foreign.mkdir(parents=True)
    cache.chmod(0o700)
    then = time.time() - 3600 * hours
    os.utime(foreign, (then, then))
    compile_library(SOURCE, "probe")
    assert foreign.is_dir() == kept


def test_a_full_disk_is_an_error_that_says_so_and_leaves_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(KernelCompileError, match=r"No space left.*OPTFACTORY_CACHE"):
        compile_library(SOURCE, "probe")
    assert names(cache) == set()
