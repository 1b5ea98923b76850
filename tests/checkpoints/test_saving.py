"""Checkpoint files: whole after a kill at any moment, and refused when they are damaged."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optfactory import build_optimizer, load_checkpoint, save_checkpoint
from optfactory.errors import StateError
from tests.checkpoints.harness import weights
from tests.torch_api.harness import assert_same_training, clones, held, train

# Writes versions of a checkpoint as fast as it can until it is killed, many times over. A
# version's tensors all hold its number, so that a mixture of two would be seen.
KILLED = """
import os, random, signal, sys, time
import torch
from optfactory import load_checkpoint, save_checkpoint

torch.set_num_threads(1)
path = sys.argv[1]

def content(version):
    tensors = [torch.full((40_000,), version, dtype=torch.int64) for _ in range(4)]
    return {"version": version, "tensors": tensors}

def read():
    found = load_checkpoint(path)
    for tensor in found["tensors"]:
        assert tensor.shape == (40_000,) and bool((tensor == found["version"]).all())
    return found["version"]

def write_on(version):
    while True:
        version += 1
        save_checkpoint(path, content(version))

save_checkpoint(path, content(0))
begin = time.perf_counter()
save_checkpoint(path, content(1))
one_save = time.perf_counter() - begin
version, midway, kills = 1, 0, 0
deadline = time.monotonic() + 100
while time.monotonic() < deadline and (kills < 60 or version < 20 or midway < 5):
    kills += 1
    before = len(os.listdir(os.path.dirname(path)))
    child = os.fork()
    if child == 0:
        write_on(version)
    time.sleep(random.uniform(0.0, 4 * one_save))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert read() >= version
    version = read()
    midway += len(os.listdir(os.path.dirname(path))) > before
print(version, midway)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills processes that it forked")
def test_a_process_killed_while_it_saves_leaves_a_whole_file(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "checkpoint.pt")],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    versions, midway = map(int, done.stdout.split())
    assert versions >= 20  # some were saved
    assert midway >= 5  # and some kills left an unfinished file beside the whole one


def calls_of(monkeypatch: pytest.MonkeyPatch, failing: str = "") -> list[str]:
    """Records what saving asks of the system, in order; one of the calls may fail."""
    made: list[str] = []

    def watch(place: Any, name: str, label: Any) -> None:
        original = getattr(place, name)

        def called(*arguments: Any, **options: Any) -> Any:
            made.append(label(*arguments))
            if made[-1] == failing:
                raise OSError(28, "No space left on device")
            return original(*arguments, **options)

        monkeypatch.setattr(place, name, called)

    def synced(descriptor: int) -> str:
        return "sync folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "sync file"

    watch(torch, "save", lambda *_: "write")
    watch(os, "fsync", synced)
    watch(Path, "replace", lambda *_: "rename")
    return made


def test_the_file_is_on_the_disk_before_it_takes_the_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = calls_of(monkeypatch)
    save_checkpoint(tmp_path / "a.pt", {"a": 1})
    assert made == ["write", "sync file", "rename", "sync folder"]
    assert os.listdir(tmp_path) == ["a.pt"]


@pytest.mark.parametrize("failing", ["write", "sync file", "rename"])
def test_a_failed_save_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    save_checkpoint(tmp_path / "a.pt", {"a": 1})
    with monkeypatch.context() as patch:
        calls_of(patch, failing)
        with pytest.raises(OSError, match="No space left"):
            save_checkpoint(tmp_path / "a.pt", {"a": 2})
    assert os.listdir(tmp_path) == ["a.pt"]
    assert load_checkpoint(tmp_path / "a.pt") == {"a": 1}


def test_what_cannot_be_saved_leaves_the_old_file(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.pt", {"a": 1})
    with pytest.raises(Exception, match="pickle"):
        save_checkpoint(tmp_path / "a.pt", {"a": lambda: 1})
    assert os.listdir(tmp_path) == ["a.pt"]
    assert load_checkpoint(tmp_path / "a.pt") == {"a": 1}


def test_a_link_keeps_pointing_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "latest.pt").symlink_to(tmp_path / "real" / "a.pt")
    save_checkpoint(tmp_path / "latest.pt", {"a": 1})
    assert (tmp_path / "latest.pt").is_symlink()
    assert load_checkpoint(str(tmp_path / "real" / "a.pt")) == {"a": 1}


def test_a_new_file_has_the_usual_permissions(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.pt", {})
    (tmp_path / "b").touch()
    assert (tmp_path / "a.pt").stat().st_mode == (tmp_path / "b").stat().st_mode


@pytest.mark.parametrize("name", ["adam", "paged_lamb8bit"])
def test_training_goes_on_from_a_file(name: str, tmp_path: Path) -> None:
    optimizer = build_optimizer(name, weights())
    train(optimizer, range(2))
    save_checkpoint(tmp_path / "a.pt", {"optimizer": optimizer.state_dict(), "step": 2})
    loaded = load_checkpoint(tmp_path / "a.pt")
    resumed = build_optimizer(name, clones(held(optimizer)))
    resumed.load_state_dict(loaded["optimizer"])
    train(optimizer, range(2, 4))
    train(resumed, range(2, 4))
    assert_same_training(optimizer, resumed)


# ---- damaged files --------------------------------------------------------------------------


def test_a_missing_file_is_the_systems_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "a.pt")


@cache
def whole() -> bytes:
    optimizer = build_optimizer("adam8bit", [torch.ones(16, 300).requires_grad_()])
    train(optimizer, range(1))
    path = Path(os.environ.get("TMPDIR", "/tmp"), f"optfactory-test-{os.getpid()}.pt")
    try:
        save_checkpoint(path, optimizer.state_dict())
        return path.read_bytes()
    finally:
        path.unlink()


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged") / "a.pt"


@given(st.data())
@settings(deadline=None, max_examples=100)
def test_a_truncated_file_is_refused(damaged: Path, data: st.DataObject) -> None:
    length = data.draw(st.integers(0, len(whole()) - 1))
    damaged.write_bytes(whole()[:length])
    with pytest.raises(StateError, match=r"a\.pt.*(truncated|damaged)"):
        load_checkpoint(damaged)


def test_changed_numbers_are_noticed(damaged: Path) -> None:
    content = bytearray(whole())
    scales = build_optimizer("adam8bit", [torch.ones(16, 300).requires_grad_()])
    train(scales, range(1))
    (state,) = scales.state.values()
    place = content.index(state["exp_avg_absmax"].numpy().tobytes())
    content[place] ^= 1
    damaged.write_bytes(content)
    assert torch.load(damaged, weights_only=True)  # torch does not look at checksums
    with pytest.raises(StateError, match=r"a\.pt is damaged: its record .*data/"):
        load_checkpoint(damaged)


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"PK\x03\x04", "später".encode()])
def test_other_files_are_refused(damaged: Path, content: bytes) -> None:
    damaged.write_bytes(content)
    with pytest.raises(StateError, match=r"no file of torch\.save"):
        load_checkpoint(damaged)


class Stranger:
    """Unpickling it would run foreign code."""


def test_a_file_that_holds_code_is_refused(damaged: Path) -> None:
    torch.save({"a": Stranger()}, damaged)
    with pytest.raises(StateError, match=r"holds .*Stranger, .*the file need not be damaged"):
        load_checkpoint(damaged)


def test_an_old_file_that_holds_code_is_refused(damaged: Path) -> None:
    torch.save({"a": Stranger()}, damaged, _use_new_zipfile_serialization=False)
    with pytest.raises(StateError, match=r"holds .*Stranger, .*the file need not be damaged"):
        load_checkpoint(damaged)


def test_files_in_torchs_old_format_are_read(damaged: Path) -> None:
    torch.save({"a": torch.ones(3)}, damaged, _use_new_zipfile_serialization=False)
    assert torch.equal(load_checkpoint(damaged)["a"], torch.ones(3))
