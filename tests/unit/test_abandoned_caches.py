"""Temporary kernel caches of processes that were killed: removed by the next one that needs one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from optfactory.build import cache

ROOT = Path(__file__).resolve().parents[2]
DAY = 24 * 3600.0
KILLED = """
import os, signal, warnings
from optfactory.build.cache import cache_folder
warnings.simplefilter("ignore")
(cache_folder() / "kernel.so").touch()
os.kill(os.getpid(), signal.SIGKILL)
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="namespaces are Linux's")


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary folders; there is no other place for kernels."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    monkeypatch.delenv("OPTFACTORY_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(cache, "_temporary", {})
    monkeypatch.setattr(cache, "_warned", {})
    return folder


@pytest.fixture
def abandoned(temporary: Path) -> Callable[..., Path]:
    """Makes what a killed process leaves, so many seconds old."""

    def leave(age: float) -> Path:
        before = set(temporary.iterdir())
        done = subprocess.run([sys.executable, "-c", KILLED], check=False, timeout=60)
        assert done.returncode == -9
        (left,) = set(temporary.iterdir()) - before
        return aged(left, age)

    return leave


def aged(folder: Path, age: float) -> Path:
    then = time.time() - age
    os.utime(folder, (then, then), follow_symlinks=False)
    return folder


def new_cache() -> Path:
    with pytest.warns(UserWarning, match="compiles its kernels anew"):
        return cache.cache_folder()


def test_the_cache_of_a_killed_process_goes_after_a_day(
    temporary: Path, abandoned: Callable[..., Path]
) -> None:
    old, young = abandoned(2 * DAY), abandoned(0.9 * DAY)
    own = new_cache()
    assert not old.exists()
    assert set(temporary.iterdir()) == {young, own}
    assert cache.is_temporary(own)


def renamed(folder: Path, change: Callable[[str], str]) -> Path:
    """A copy under another name, as old."""
    other = folder.with_name(change(folder.name))
    other.mkdir()
    return aged(other, 2 * DAY)


def with_process(name: str, process: object) -> str:
    *begin, _, end = name.split("-")
    return "-".join([*begin, str(process), end])


def test_nothing_else_is_removed(temporary: Path, abandoned: Callable[..., Path]) -> None:
    left = abandoned(2 * DAY)
    *_, numbers, process, end = left.name.split("-")
    kept = {
        renamed(left, lambda name: with_process(name, os.getppid())),
        renamed(left, lambda name: with_process(name, 1)),
        renamed(left, lambda name: with_process(name, 0)),
        renamed(left, lambda name: with_process(name, -1)),
        renamed(left, lambda name: with_process(name, "9" * 30)),
        renamed(left, lambda name: f"{name}-more"),
        renamed(left, lambda name: f"optfactory-kernels-{end}"),
        # of another machine, boot or container: its process cannot be seen from here
        renamed(left, lambda name: name.replace(numbers, numbers[::-1])),
    }
    elsewhere = temporary.parent / "elsewhere"
    elsewhere.mkdir()
    link = temporary / f"{left.name[:-1]}_"
    link.symlink_to(elsewhere)
    kept |= {aged(link, 2 * DAY)}
    own = new_cache()
    assert set(temporary.iterdir()) == {*kept, own}
    assert int(process) > 1


def test_what_belongs_to_another_user_stays(
    abandoned: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    left = abandoned(2 * DAY)
    monkeypatch.setattr(cache.os, "getuid", lambda: left.stat().st_uid + 1)
    new_cache()
    assert left.is_dir()


def test_where_process_numbers_mean_nothing_nothing_is_removed(
    abandoned: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    left = abandoned(2 * DAY)
    monkeypatch.setattr(cache.os, "readlink", lambda path: (_ for _ in ()).throw(OSError()))
    own = new_cache()
    assert left.is_dir()
    assert own.name.count("-") == 2
