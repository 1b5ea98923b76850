"""States go by place; names say whether a place still means the same parameter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from optfactory import Optimizer2State, build_optimizer
from optfactory.errors import StateError
from tests.torch_api.harness import snapshot, train


def pairs(names: Sequence[str]) -> list[Any]:
    return [(name, torch.ones(8, 40).requires_grad_()) for name in names]


def ours(*groups: Sequence[str]) -> Optimizer2State:
    optimizer = build_optimizer("adamw", [{"params": pairs(names)} for names in groups])
    train(optimizer, range(1))
    return optimizer


def torchs(*groups: Sequence[str]) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW([{"params": pairs(names)} for names in groups])
    train(optimizer, range(1))
    return optimizer


@pytest.mark.parametrize("source", [ours, torchs])
@pytest.mark.parametrize(
    ("there", "here", "problem"),
    [
        (["abcd"], ["bcde"], r"moved parameters \(b as number 1, here 0; c as number 2, here 1"),
        (["abcd"], ["xabc"], r"moved parameters \(a as number 0, here 1"),
        (["abcd"], ["bacd"], r"moved parameters \(a as number 0, here 1; b as number 1, here 0\)"),
        (["ab"], ["ba"], "the same parameters in another order"),
        (["ab", "cd"], ["ab", "dx"], r"param_groups\[1\]\.param_names: .*d as number 1, here 0"),
        (["ab", "cd"], ["ac", "bd"], r"has b here, and this optimizer in another group"),
        (["ab", "c"], ["xa", "b"], r"has b here, and this optimizer in another group"),
    ],
)
def test_a_name_that_is_known_at_another_place_is_refused(
    source: Any, there: list[str], here: list[str], problem: str
) -> None:
    saved = source(*there).state_dict()
    optimizer = ours(*here)
    before = snapshot(optimizer)
    with pytest.raises(StateError, match=problem):
        optimizer.load_state_dict(saved)
    assert snapshot(optimizer) == before


@pytest.mark.parametrize("source", [ours, torchs])
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module."])
def test_what_wrappers_put_into_names_does_not_hide_a_shift(source: Any, prefix: str) -> None:
    saved = source([f"{prefix}layers.{number}" for number in (0, 1, 2)]).state_dict()
    with pytest.raises(StateError, match=r"layers\.1 as number 1, here 0"):
        ours([f"layers.{number}" for number in (1, 2, 3)]).load_state_dict(saved)
    ours([f"layers.{number}" for number in (0, 1, 2)]).load_state_dict(saved)


@pytest.mark.parametrize("source", [ours, torchs])
@pytest.mark.parametrize("here", ["wxyz", "abcx", "xbcd"])
def test_names_that_are_new_here_go_by_place(source: Any, here: str) -> None:
    optimizer = ours(here)
    optimizer.load_state_dict(source("abcd").state_dict())
    assert all(float(entries["step"]) == 1 for entries in optimizer.state.values())
    train(optimizer, range(1, 2))


def test_a_checkpoint_without_names_goes_by_place() -> None:
    source = torch.optim.AdamW([p for _, p in pairs("ab")])
    train(source, range(1))
    ours("ba").load_state_dict(source.state_dict())
