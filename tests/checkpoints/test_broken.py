"""Broken checkpoints of every layout: always our error, and nothing changed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor

from optfactory import Optimizer2State, build_optimizer
from optfactory.errors import StateError
from tests.checkpoints.harness import NESTED, StateDict, nested
from tests.torch_api.harness import snapshot, train

SHAPES = [(3, 300), (3,)]


def tensors() -> list[Tensor]:
    return [torch.ones(shape).requires_grad_() for shape in SHAPES]


def small(name: str) -> Optimizer2State:
    named = [(f"w{index}", p) for index, p in enumerate(tensors())]
    bits = {"min_8bit_size": 0} if name.endswith("8bit") else {}
    optimizer = build_optimizer(name, named, **bits)
    train(optimizer, range(1))
    return optimizer


@cache
def checkpoint(layout: str) -> StateDict:
    if layout in ("adamw8bit", "adamw"):
        return small(layout).state_dict()
    if layout == "bitsandbytes":
        return nested(small("adamw8bit").export_state_dict("bitsandbytes"))
    optimizer = torch.optim.AdamW(tensors())
    train(optimizer, range(1))
    return optimizer.state_dict()


LAYOUTS = ("adamw8bit", "adamw", "torch", "bitsandbytes")
TARGETS = st.sampled_from(["adamw8bit", "adamw", "paged_adamw8bit"])

CHANGES: dict[str, Callable[[Any], Any]] = {
    "another dtype": lambda t: t.to(torch.int16),
    "complex": lambda t: t.to(torch.complex64),
    "an element less": lambda t: t.reshape(-1)[:-1],
    "an element more": lambda t: torch.cat([t.reshape(-1), t.reshape(-1)[:1]]),
    "one more dimension": lambda t: t[None],
    "no data": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "a list": lambda t: t.tolist(),
    "a number": lambda t: 1.0,
    "nothing": lambda t: None,
    "text": lambda t: "x",
    "NaN": lambda t: torch.full_like(t, math.nan),
    "negative": lambda t: torch.full_like(t, -0.5),
}
# Where NaN and negative numbers cannot be: scales, and the maps of bitsandbytes.
NUMBERS = ("absmax", "qmap2")


@given(st.sampled_from(LAYOUTS), TARGETS, st.data())
@settings(deadline=None, max_examples=300)
def test_a_broken_field_is_named_with_its_parameter(
    layout: str, target: str, data: st.DataObject
) -> None:
    saved = copy.deepcopy(checkpoint(layout))
    entries = saved["state"][0]
    entries = entries.get(NESTED, entries)
    field = data.draw(st.sampled_from(sorted(set(entries) - {"step"})))
    kinds = list(CHANGES)
    if not any(part in field for part in NUMBERS):
        kinds = kinds[:-2]
    change = data.draw(st.sampled_from(["missing", "extra", *kinds]))
    if change == "missing":
        del entries[field]
    elif change == "extra":
        entries[f"{field}_2"] = entries[field]
    else:
        entries[field] = CHANGES[change](entries[field])
    optimizer = small(target)
    before = snapshot(optimizer)
    with pytest.raises(StateError, match=rf"(?s)w0\b.*{field}"):
        optimizer.load_state_dict(saved)
    assert snapshot(optimizer) == before
    train(optimizer, range(1, 2))


ODD = st.sampled_from(
    [
        None, True, -1, 3, 10**30, 10**400, 1.5, math.nan, math.inf, "", "x", b"x", 1j,
        (), [], {}, [1, 2], {"a": 1}, {0: {}}, {NESTED: {}}, {"state1": {}}, (0.5, 0.5),
        torch.tensor(1.0), torch.tensor(math.nan), torch.ones(2), torch.ones(3, 300),
        torch.ones(3, 300, dtype=torch.uint8), torch.ones(256), torch.ones(6),
        torch.ones(3, device="meta"), torch.tensor(1.0, device="meta"), torch.eye(3).to_sparse(),
        torch.tensor(1j), torch.tensor(True),
    ]
)  # fmt: skip
KEYS = st.sampled_from(
    ["extra", 5, "lr", "maximize", "amsgrad", "format_version", "optimizer", "state1", NESTED,
     "exp_avg", "max_exp_avg_sq", "exp_avg_q8", "block_size", "decoupled_weight_decay", "alpha"]
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


@given(st.sampled_from(LAYOUTS), TARGETS, st.data())
@settings(deadline=None, max_examples=500)
def test_a_fuzzed_checkpoint_loads_and_trains_or_changes_nothing(
    layout: str, target: str, data: st.DataObject
) -> None:
    saved = copy.deepcopy(checkpoint(layout))
    for _ in range(data.draw(st.integers(1, 3))):
        found = places(saved)
        if not found:
            break
        *parents, last = data.draw(st.sampled_from(found))
        place: Any = saved
        for key in parents:
            place = place[key]
        action = data.draw(st.sampled_from(["replace", "replace", "drop", "add"]))
        if action == "drop":
            del place[last]
        elif action == "add" and isinstance(place, dict):
            place[data.draw(KEYS)] = copy.deepcopy(data.draw(ODD))
        else:
            place[last] = copy.deepcopy(data.draw(ODD))
    optimizer = small(target)
    before = snapshot(optimizer)
    with suppress(StateError):
        optimizer.load_state_dict(saved)
        before = snapshot(optimizer)
    assert snapshot(optimizer) == before
    train(optimizer, range(1, 2))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_parameter_twice_is_refused(layout: str) -> None:
    saved = copy.deepcopy(checkpoint(layout))
    saved["param_groups"][0]["params"] = [0, 0]
    with pytest.raises(StateError, match="twice"):
        small("adamw8bit").load_state_dict(saved)


@pytest.mark.parametrize("layout", ["adamw", "torch"])
def test_a_negative_second_moment_is_refused(layout: str) -> None:
    saved = copy.deepcopy(checkpoint(layout))
    saved["state"][0]["exp_avg_sq"][1, 1] = -1e-9
    with pytest.raises(StateError, match=r"w0\.exp_avg_sq: has negative elements"):
        small("adamw8bit").load_state_dict(saved)


def test_a_subclass_of_tensors_is_refused() -> None:
    state = TwoTensor(torch.ones(64, 256), torch.ones(64, 256))
    saved = torch.optim.AdamW([torch.ones(64, 256).requires_grad_()]).state_dict()
    saved["state"][0] = {"step": torch.tensor(1.0), "exp_avg": state, "exp_avg_sq": state}
    ours = build_optimizer("adamw", [torch.ones(64, 256).requires_grad_()])
    with pytest.raises(StateError, match="expected a plain tensor, got TwoTensor"):
        ours.load_state_dict(saved)
