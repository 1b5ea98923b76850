"""Checkpoints that do not fit are named and change nothing."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from optfactory import Optimizer2State, build_optimizer, list_optimizers
from optfactory.errors import StateError
from tests.torch_api.harness import (
    parameters,
    snapshot,
    through_file,
    train,
    trained,
)

NAMES = list_optimizers()
StateDict = dict[str, Any]

pytestmark = pytest.mark.usefixtures("small_tensors")


# ---- what does not fit ----------------------------------------------------------------------


def refused(optimizer: Optimizer2State, saved: Any) -> str:
    """The message of the StateError; everything is as before, and training can go on."""
    before = snapshot(optimizer)
    with pytest.raises(StateError) as caught:
        optimizer.load_state_dict(saved)
    assert snapshot(optimizer) == before
    train(optimizer, range(90, 91))
    return str(caught.value)


def edit(*path: Any, to: Any = None) -> Callable[[StateDict], None]:
    """An edit of the value at a path; `to` may be a function of the old value."""

    def apply(saved: StateDict) -> None:
        *parents, last = path
        place: Any = saved
        for key in parents:
            place = place[key]
        place[last] = to(place[last]) if callable(to) else to

    return apply


def drop(*path: Any) -> Callable[[StateDict], None]:
    def apply(saved: StateDict) -> None:
        *parents, last = path
        place: Any = saved
        for key in parents:
            place = place[key]
        del place[last]

    return apply


GROUP = ("param_groups", 0)
EDITS: dict[str, tuple[Callable[[StateDict], Any], list[str]]] = {
    "codes of another dtype": (
        edit("state", 0, "exp_avg_q8", to=Tensor.char),
        ["weight0.exp_avg_q8", "torch.uint8", "torch.int8"],
    ),
    "scales of another dtype": (
        edit("state", 1, "exp_avg_sq_absmax", to=Tensor.half),
        ["weight1.exp_avg_sq_absmax", "torch.float32", "torch.float16"],
    ),
    "states of another dtype": (
        edit("state", 3, "exp_avg", to=Tensor.bfloat16),
        ["weight3.exp_avg", "torch.float32", "torch.bfloat16"],
    ),
    "codes of another shape": (
        edit("state", 0, "exp_avg_q8", to=lambda t: t.t()),
        ["weight0.exp_avg_q8", "(20, 300)", "(300, 20)"],
    ),
    "scales of another shape": (
        edit("state", 0, "exp_avg_absmax", to=lambda t: t.reshape(-1)),
        ["weight0.exp_avg_absmax", "(20, 2)", "(40,)"],
    ),
    "states of another shape": (
        edit("state", 3, "exp_avg_sq", to=lambda t: t[:-1]),
        ["weight3.exp_avg_sq", "(255,)", "(254,)"],
    ),
    "a step with a dimension": (edit("state", 0, "step", to=lambda t: t[None]), ["weight0.step"]),
    "a text as step": (edit("state", 0, "step", to="3"), ["weight0.step", "str"]),
    "half a step": (edit("state", 0, "step", to=0.5), ["weight0.step", "0.5"]),
    "scales that are no numbers": (
        edit("state", 1, "exp_avg_absmax", to=lambda t: t * math.nan),
        ["weight1.exp_avg_absmax", "NaN"],
    ),
    "a negative step": (edit("state", 0, "step", to=torch.tensor(-1.0)), ["weight0.step"]),
    "a step that is no number": (
        edit("state", 0, "step", to=torch.tensor(math.nan)),
        ["weight0.step"],
    ),
    "tensors without data": (
        edit("state", 5, "exp_avg", to=lambda t: t.to("meta")),
        ["weight5.exp_avg", "meta"],
    ),
    "sparse states": (
        edit("state", 3, "exp_avg", to=lambda t: t.to_sparse()),
        ["weight3.exp_avg", "sparse"],
    ),
    "a missing state": (drop("state", 0, "exp_avg_q8"), ["weight0", "exp_avg_q8"]),
    "a missing step": (drop("state", 4, "step"), ["weight4", "step"]),
    "an extra state": (edit("state", 0, "qmap", to=torch.ones(256)), ["weight0", "qmap"]),
    "no states of a parameter but its step": (
        edit("state", 0, to=lambda entries: {"step": entries["step"]}),
        ["weight0", "exp_avg_q8"],
    ),
    "a list as states": (edit("state", 0, to=[]), ["weight0", "list"]),
    "states of a stranger": (edit("state", 77, to={}), ["77"]),
    "no states": (drop("state"), ["state"]),
    "a list of states": (edit("state", to=[]), ["state"]),
    "no groups": (drop("param_groups"), ["param_groups"]),
    "groups by name": (edit("param_groups", to={}), ["param_groups"]),
    "an empty list of groups": (edit("param_groups", to=[]), ["param group"]),
    "another group": (edit("param_groups", to=lambda g: g + g), ["[6, 6]", "[6]"]),
    "one parameter less": (edit(*GROUP, "params", to=lambda ids: ids[:-1]), ["[5]", "[6]"]),
    "one parameter more": (edit(*GROUP, "params", to=lambda ids: [*ids, 6]), ["[7]", "[6]"]),
    "no parameters": (drop(*GROUP, "params"), ["[0]", "[6]"]),
    "a newer format": (edit(*GROUP, "format_version", to=2), ["format_version", "2", "newer"]),
    "no format": (drop(*GROUP, "format_version"), ["format_version", "missing"]),
    "a format that is no number": (edit(*GROUP, "format_version", to="one"), ["format_version"]),
    "another family": (edit(*GROUP, "optimizer", to="lamb8bit"), ["optimizer", "lamb", "adam"]),
    "an unknown name": (edit(*GROUP, "optimizer", to="adamm"), ["optimizer", "adamm"]),
    "a number as name": (edit(*GROUP, "optimizer", to=8), ["optimizer", "8"]),
    "no name": (drop(*GROUP, "optimizer"), ["optimizer"]),
    "a block size that its scales do not have": (
        edit(*GROUP, "block_size", to=64),
        ["weight0.exp_avg_absmax", "(20, 5)", "(20, 2)"],
    ),
    "a block size that is none": (edit(*GROUP, "block_size", to=100), ["block_size", "100"]),
    "no block size": (drop(*GROUP, "block_size"), ["block_size", "missing"]),
    "another number of states": (edit(*GROUP, "amsgrad", to=True), ["amsgrad"]),
    "no lr": (drop(*GROUP, "lr"), ["param_groups[0].lr", "missing"]),
    "an lr that is no number": (edit(*GROUP, "lr", to="fast"), ["param_groups[0].lr", "fast"]),
    "an lr of nan": (edit(*GROUP, "lr", to=math.nan), ["param_groups[0].lr", "nan"]),
    "one beta": (edit(*GROUP, "betas", to=(0.9,)), ["param_groups[0].betas", "0.9"]),
    "a beta of 1": (edit(*GROUP, "betas", to=(0.9, 1.0)), ["param_groups[0].betas", "1.0"]),
    "eps below zero": (edit(*GROUP, "eps", to=-1e-8), ["param_groups[0].eps"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(kernel_cache: Path) -> StateDict:
    return through_file(trained("adam8bit").state_dict())


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize(("change", "words"), EDITS.values(), ids=EDITS)
def test_what_does_not_fit_is_named_and_changes_nothing(
    checkpoint: StateDict, change: Callable[[StateDict], Any], words: list[str], fresh: bool
) -> None:
    saved = copy.deepcopy(checkpoint)
    change(saved)
    named = [(f"weight{i}", p) for i, p in enumerate(parameters(seed=1))]
    optimizer = build_optimizer("adam8bit", named, lr=0.25)
    train(optimizer, range(0 if fresh else 2))
    message = refused(optimizer, saved)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("saved_by", "loaded_by", "word"),
    [
        (("adamw", {}), ("adam", {}), "optimizer"),
        (("lamb", {}), ("paged_adamw", {}), "optimizer"),
        (("adam", {"amsgrad": True}), ("adam", {}), "amsgrad"),
        (("adam", {}), ("adam", {"amsgrad": True}), "amsgrad"),
    ],
)
def test_a_checkpoint_that_contradicts_the_config_is_refused(
    saved_by: tuple[str, Any], loaded_by: tuple[str, Any], word: str
) -> None:
    saved = through_file(trained(saved_by[0], **saved_by[1]).state_dict())
    assert word in refused(trained(loaded_by[0], steps=1, **loaded_by[1]), saved)


@pytest.mark.parametrize("saved", [{}, {"state": {}}, {"param_groups": []}])
def test_an_incomplete_state_dict_is_refused(saved: StateDict) -> None:
    refused(trained("lamb8bit", steps=1), saved)


def test_all_problems_of_a_checkpoint_are_listed_up_to_ten() -> None:
    optimizer = trained("adam8bit", steps=1)
    saved = through_file(optimizer.state_dict())
    for entry in saved["state"].values():
        for key in entry:
            entry[key] = entry[key].double()
    message = refused(optimizer, saved)
    listed = [line for line in message.splitlines() if "torch.float64" in line]
    assert len(listed) == 10
    assert "18 problem(s)" in message  # 3 8-bit parameters with 4 states, 3 others with 2
    assert "8 more" in message


def test_a_full_disk_at_load_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    saved = through_file(trained("paged_adam", lr=0.5).state_dict())
    optimizer = build_optimizer("paged_adam", parameters(), lr=0.25)
    before = snapshot(optimizer)

    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.posix_fallocate", full)
        with pytest.raises(OSError, match="No space left"):
            optimizer.load_state_dict(saved)
    assert snapshot(optimizer) == before
    assert not optimizer.state
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.5


# ---- fuzzed checkpoints ---------------------------------------------------------------------

odd = st.sampled_from(
    [
        None, True, -1, 3, 10**30, 1.5, math.nan, math.inf, "", "x", b"x", 1j,
        (), [], {}, [1, 2], [[1], [2]], {"a": 1}, {0: {}}, (0.5, 0.5), [0.5, 2],
        torch.tensor(1.0), torch.tensor(math.nan), torch.ones(2), torch.ones(2, dtype=torch.uint8),
        torch.ones(3, device="meta"), torch.eye(3).to_sparse(),
    ]
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of everything inside of a nest of dicts and lists."""
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    inner = [(*path, key) for key, _ in items]
    return inner + [deep for key, item in items for deep in places(item, (*path, key))]


def small_optimizer() -> Optimizer2State:
    params = [torch.ones(2, 64).requires_grad_(), torch.ones(3).requires_grad_()]
    optimizer = build_optimizer("lamb8bit", params, min_8bit_size=0)
    train(optimizer, range(1))
    return optimizer


@cache
def small_checkpoint() -> StateDict:
    return small_optimizer().state_dict()


@given(data=st.data())
@settings(deadline=None, max_examples=250)
def test_a_fuzzed_checkpoint_loads_and_trains_or_changes_nothing(data: st.DataObject) -> None:
    saved = copy.deepcopy(small_checkpoint())
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(places(saved)))
        action = data.draw(st.sampled_from(["replace", "replace", "drop", "add"]))
        *parents, last = path
        place: Any = saved
        for key in parents:
            place = place[key]
        if action == "drop":
            del place[last]
        elif action == "add" and isinstance(place, dict):
            place[data.draw(st.sampled_from(["extra", 5, "lr"]))] = copy.deepcopy(data.draw(odd))
        else:
            place[last] = copy.deepcopy(data.draw(odd))
        if not places(saved):
            break
    optimizer = small_optimizer()
    before = snapshot(optimizer)
    with suppress(StateError):
        optimizer.load_state_dict(saved)
        before = snapshot(optimizer)
    assert snapshot(optimizer) == before
    train(optimizer, range(1, 2))


@given(st.recursive(odd, lambda inner: st.dictionaries(st.text(max_size=3), inner, max_size=3)))
@settings(deadline=None, max_examples=50)
def test_other_things_are_no_checkpoint(saved: Any) -> None:
    optimizer = build_optimizer("adam", [torch.ones(3).requires_grad_()])
    before = snapshot(optimizer)
    with pytest.raises(StateError):
        optimizer.load_state_dict(saved)
    assert snapshot(optimizer) == before


def test_a_checkpoint_of_parameters_in_another_order_is_refused() -> None:
    def build(order: str) -> Optimizer2State:
        tensors = {name: torch.ones(300, requires_grad=True) for name in "ab"}
        return build_optimizer("adam", [(name, tensors[name]) for name in order])

    saved = build("ab")
    saved.init_states()
    with pytest.raises(StateError, match=r"param_names.*another order"):
        build("ba").load_state_dict(saved.state_dict())
    build("ab").load_state_dict(saved.state_dict())
