"""The kernel cache: what many processes build at once, what killed ones leave, where it can be."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest

from optfactory.build import cache as kernel_cache
from optfactory.build import compiler, once
from optfactory.build.compiler import compile_library, find_compiler, load_library
from optfactory.errors import BrokenCompilerError, KernelCompileError
from tests.unit.harness import SOURCE, answer, needs_compiler

ROOT = Path(__file__).resolve().parents[2]
COMPILE = """
import sys
from optfactory.build.compiler import compile_library
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


def start(source: str = SOURCE, **environment: str) -> subprocess.Popen[str]:
    """A process, and a group of processes, that compiles a source."""
    return subprocess.Popen(
        [sys.executable, "-c", COMPILE, source],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_build(folder: Path) -> Path:
    """The folder in which a kernel is being built."""
    until = time.monotonic() + LIMIT
    while time.monotonic() < until:
        if found := [file.parent for file in folder.glob("build-*/kernel.cpp")]:
            return found[0]
        time.sleep(0.02)
    raise AssertionError("nothing was built")


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


# ---- built once ------------------------------------------------------------------------------


def test_of_several_processes_one_compiles_and_the_others_wait(cache: Path, calls: Path) -> None:
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
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", slow_compiler(tmp_path))
    killed, alive = start(), start(SOURCE.replace("42", "43"))
    while len(list(cache.glob("build-*/kernel.cpp"))) < 2:
        wait_for_build(cache)
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
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", slow_compiler(tmp_path))
    killed = start()
    wait_for_build(cache)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate(timeout=LIMIT)
    (tmp_path / "go").touch()
    library = compile_library(SOURCE, "probe")
    assert names(cache) == {library.name}


def test_ctrl_c_leaves_nothing_and_makes_no_slow_kernel(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", slow_compiler(tmp_path))
    run = start()
    wait_for_build(cache)
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


# ---- where it can be -------------------------------------------------------------------------


@pytest.mark.parametrize("variable", ["OPTFACTORY_CACHE", "XDG_CACHE_HOME"])
def test_a_tilde_is_the_home_folder(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("OPTFACTORY_CACHE")
    monkeypatch.setenv(variable, "~/kernels")
    assert tmp_path / "home" / "kernels" in (folder := kernel_cache.cache_folder(), folder.parent)
    assert names(tmp_path) == {"home"}


def test_a_tilde_that_is_nobodys_home_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPTFACTORY_CACHE", "~no-such-user/kernels")
    with pytest.raises(KernelCompileError, match=r"~no-such-user.*home"):
        kernel_cache.cache_folder()
    assert names(tmp_path) == set()


def test_a_tilde_in_cxx_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "my-c++"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o700)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "~/my-c++ -v")
    assert find_compiler() == [str(script), "-v"]


UNUSABLE = """
import multiprocessing, os, sys, warnings
from optfactory.build.compiler import compile_library

def compile(number):
    return str(compile_library(f'extern "C" int answer() {{ return {number}; }}', "probe").parent)

if __name__ == "__main__":
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        folders = [compile(1), compile(2)]
    assert len(set(folders)) == len(seen) == 1, seen
    assert "XDG" not in str(seen[0].message) and "OPTFACTORY_CACHE" in str(seen[0].message)
    warnings.simplefilter("ignore")
    context = multiprocessing.get_context("fork")
    with context.Pool(1) as pool:
        assert pool.apply(compile, (3,)) != folders[0]
        pool.close()
        pool.join()
    child = os.fork()
    if child == 0:
        sys.exit()  # runs what the parent registered for its own end
    os.waitpid(child, 0)
    assert os.path.isdir(folders[0])
"""


def test_a_temporary_cache_is_warned_of_once_and_goes_with_the_process_that_made_it(
    tmp_path: Path,
) -> None:
    file, temporary = tmp_path / "file", tmp_path / "temporary"
    file.touch()
    temporary.mkdir()
    environment = {key: value for key, value in os.environ.items() if key != "OPTFACTORY_CACHE"}
    environment |= {"XDG_CACHE_HOME": str(file), "TMPDIR": str(temporary), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", UNUSABLE],
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert list(temporary.iterdir()) == []


def test_the_users_cache_is_taken_without_a_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPTFACTORY_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library = compile_library(SOURCE, "probe")
    assert library.parent == tmp_path / "optfactory"
    assert stat.S_IMODE(library.parent.stat().st_mode) == 0o700


def test_a_temporary_cache_that_was_cleared_away_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPTFACTORY_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    with pytest.warns(UserWarning, match="compiles its kernels anew"):
        first = kernel_cache.cache_folder()
    assert kernel_cache.cache_folder() == first
    shutil.rmtree(first)
    assert answer(compile_library(SOURCE, "probe")) == 42


# ---- file systems that run nothing ------------------------------------------------------------


def forbid_running(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading fails as it does on a file system mounted noexec."""
    real = compiler.ctypes.CDLL

    def load(path: str) -> Any:
        if Path(path).is_relative_to(folder):
            raise OSError(f"{path}: failed to map segment from shared object")
        return real(path)

    monkeypatch.setattr(compiler.ctypes, "CDLL", load)


def test_kernels_run_from_elsewhere_where_the_cache_forbids_it(
    cache: Path, calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    forbid_running(cache, monkeypatch)
    with pytest.warns(UserWarning, match=f"run from .*{cache}.*noexec.*OPTFACTORY_CACHE"):
        library = load_library(SOURCE, "probe")
    assert library.answer() == 42
    assert load_library(SOURCE, "probe").answer() == 42  # a second warning would be an error
    assert len(calls.read_text().splitlines()) == 1
    assert list(temporary.iterdir()) == []


def test_the_users_cache_serves_where_temporary_folders_run_nothing_either(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, temporary = tmp_path / "home", tmp_path / "temporary"
    (home / "optfactory").mkdir(parents=True)
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    forbid_running(cache, monkeypatch)
    forbid_running(temporary, monkeypatch)
    with pytest.warns(UserWarning, match="noexec"):
        assert load_library(SOURCE, "probe").answer() == 42


def test_where_nothing_can_be_run_the_error_says_what_to_do(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_running(Path("/"), monkeypatch)
    with pytest.raises(BrokenCompilerError, match=r"cannot be loaded.*OPTFACTORY_CACHE"):
        load_library(SOURCE, "probe")


def test_a_damaged_kernel_is_not_taken_for_a_folder_that_forbids_running(cache: Path) -> None:
    compile_library(SOURCE, "probe").write_bytes(b"damaged")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_library(SOURCE, "probe").answer() == 42


MOUNT = """
mount -t tmpfs -o noexec,mode=700 tmpfs "$OPTFACTORY_CACHE" || exit 77
exec "$0" -c "
from optfactory.build.compiler import load_library
assert load_library('extern \\"C\\" int answer() { return 42; }', 'probe').answer() == 42
"
"""


@pytest.mark.skipif(not shutil.which("unshare"), reason="nothing can be mounted here")
def test_on_a_file_system_that_is_mounted_noexec(cache: Path) -> None:
    cache.mkdir(mode=0o700)
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", MOUNT, sys.executable],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    if "unshare" in done.stderr or done.returncode == 77:
        pytest.skip("nothing may be mounted here")
    assert done.returncode == 0, done.stderr
    assert "mounted noexec" in done.stderr
