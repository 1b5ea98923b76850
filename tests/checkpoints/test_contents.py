"""What is saved can be loaded: numbers become plain, everything else is refused with its place."""

from __future__ import annotations

import os
import stat
from collections import OrderedDict, deque
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from optfactory import build_optimizer, load_checkpoint, resolve, save_checkpoint
from optfactory.errors import StateError


class Text(str):
    """As a configuration library may have it."""


class Weights(torch.Tensor):
    """A subclass that no safe load knows."""


def test_numpys_numbers_and_texts_are_stored_as_pythons(tmp_path: Path) -> None:
    saved = {
        "lr": np.float64(0.1),
        "steps": [np.int64(3), (np.bool_(True),)],
        np.str_("a"): Text("b"),
    }
    save_checkpoint(tmp_path / "a.pt", saved)
    found = load_checkpoint(tmp_path / "a.pt")
    assert found == {"lr": 0.1, "steps": [3, (True,)], "a": "b"}
    assert type(found["lr"]) is float
    assert type(saved["lr"]) is np.float64  # what was given stays as it was


def test_the_schedules_and_the_optimizers_states_are_stored(tmp_path: Path) -> None:
    optimizer = build_optimizer("adam", [torch.ones(3).requires_grad_()], lr=np.float64(0.1))
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, float(np.float64(0.5)))
    optimizer.param_groups[0]["lr"] = schedule.base_lrs[0] = np.float64(0.2)
    saved = {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    save_checkpoint(tmp_path / "a.pt", saved)
    assert load_checkpoint(tmp_path / "a.pt")["schedule"]["base_lrs"] == [0.2]


def test_what_holds_nothing_of_numpy_is_written_as_it_is(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2).state_dict()
    loop: list[Any] = [1]
    loop.append(loop)
    save_checkpoint(tmp_path / "a.pt", {"model": model, "loop": loop, "size": torch.Size([2])})
    found = load_checkpoint(tmp_path / "a.pt")
    assert found["model"]._metadata == model._metadata  # type: ignore[attr-defined]
    assert found["loop"][1] is found["loop"]
    assert type(found["size"]) is torch.Size


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (resolve("adam8bit"), ["run.1.x: a optfactory.", "store its .model_dump()"]),
        (Path("/tmp"), ["run.1.x: a pathlib.", "store str(path)"]),
        (np.random.get_state(), ["run.1.x.1: a numpy.ndarray", "torch.from_numpy(array)"]),
        (deque([1]), ["run.1.x: a collections.deque", "store its values"]),
        (OrderedDict(a=np.float64(1)), ["run.1.x.a: a numpy.float64"]),
        ({Path("/tmp"): 1}, ["run.1.x./tmp (the key): a pathlib."]),
        (
            torch.ones(2).as_subclass(Weights),
            ["run.1.x: a tests.checkpoints.test_contents.Weights"],
        ),
        (lambda: 1, ["run.1.x: a builtins.function, which cannot be pickled"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_would_be_refused_at_loading_is_refused_at_saving(
    value: Any, words: list[str], tmp_path: Path
) -> None:
    save_checkpoint(tmp_path / "a.pt", {"a": 1})
    with pytest.raises(StateError, match="load_checkpoint") as caught:
        save_checkpoint(tmp_path / "a.pt", {"fine": 1, "run": [0, {"x": value}]})
    for word in words:
        assert word in str(caught.value)
    assert "fine" not in str(caught.value)
    assert os.listdir(tmp_path) == ["a.pt"]
    assert load_checkpoint(tmp_path / "a.pt") == {"a": 1}


def test_a_class_that_the_user_allowed_is_saved_and_loaded(tmp_path: Path) -> None:
    with torch.serialization.safe_globals([Fraction]):
        save_checkpoint(tmp_path / "a.pt", {"x": Fraction(1, 2)})
        assert load_checkpoint(tmp_path / "a.pt") == {"x": Fraction(1, 2)}


def test_a_whole_file_that_is_not_read_is_not_called_damaged(tmp_path: Path) -> None:
    torch.save({"x": deque([1])}, tmp_path / "a.pt")
    with (
        torch.serialization.safe_globals([deque]),  # the class may be called, and not be filled
        pytest.raises(StateError, match=r"a\.pt: it is whole, and weights_only=True does not"),
    ):
        load_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize("name", ["a" * 218, "a" * 255, "ä" * 127, "a"])
def test_names_of_any_length_are_written(name: str, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / name, {"a": 1})
    save_checkpoint(tmp_path / name, {"a": 2})
    assert os.listdir(tmp_path) == [name]
    assert load_checkpoint(tmp_path / name) == {"a": 2}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_a_pipe_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for name in ("pipe", "link"):
        with pytest.raises(OSError, match="a pipe, a socket or a device is there"):
            save_checkpoint(tmp_path / name, {"a": 1})
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert sorted(os.listdir(tmp_path)) == ["link", "pipe"]


def test_a_folder_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="a folder is there"):
        save_checkpoint(tmp_path, {"a": 1})
    assert os.listdir(tmp_path) == []
