"""Where kernels are kept and loaded from: homes, temporary folders, mounts that run nothing."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from optfactory.build import cache as kernel_cache
from optfactory.build import compiler
from optfactory.build.compiler import compile_library, find_compiler, load_library
from optfactory.errors import BrokenCompilerError, KernelCompileError
from tests.unit.harness import SOURCE, answer, needs_compiler

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 60.0  # seconds until a wait has failed

pytestmark = needs_compiler


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


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
