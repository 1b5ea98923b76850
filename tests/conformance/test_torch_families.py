"""The families that torch.optim has, beside its own; Adam and AdamW are in test_torch.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from optfactory import build_optimizer
from optfactory.errors import ConfigError
from tests.conformance.harness import Deviation, apart, feed, pair
from tests.reference import REFERENCES

SHAPES = [(1,), (257,), (33, 300), (16, 8, 3, 3)]
STEPS = 60
CASES = [
    pytest.param(family, reference.facts.torch_peer, asked, id=f"{family}-{number}")
    for family, reference in REFERENCES.items()
    for number, asked in enumerate(reference.facts.torch_cases)
]


@pytest.mark.parametrize(("name", "peer", "asked"), CASES)
def test_trajectory_and_states_are_those_of_torch(
    name: str, peer: str, asked: Mapping[str, Any], backend: str, deviation: Deviation
) -> None:
    pairs = pair(SHAPES)
    asked = {"lr": 1e-2, **asked}
    ours = build_optimizer(name, pairs[0], **asked)
    theirs = getattr(torch.optim, peer)(pairs[1], **asked)
    for step in range(STEPS):
        feed(step, *pairs)
        ours.step()
        theirs.step()
    size = _greatest(pairs[1])
    for p, q in zip(*pairs, strict=True):
        deviation("p, relative", apart(p, q, size), 1e-6)
    for key in ours.state[pairs[0][0]].keys() - {"step"}:
        states = [theirs.state[q][key] for q in pairs[1]]
        size = _greatest(states)
        for p, state in zip(pairs[0], states, strict=True):
            deviation(f"{key}, relative", apart(ours.state[p][key], state, size), 1e-6)


def _greatest(tensors: list[Tensor]) -> float:
    return max(float(x.detach().abs().max()) for x in tensors)


def test_no_momentum_has_no_state_and_goes_on_after_a_resume(backend: str) -> None:
    sides = pair(SHAPES)
    optimizers = [build_optimizer("paged_sgd", p, lr=0.1, momentum=0.0) for p in sides]
    feed(0, *sides)
    for optimizer in optimizers:
        optimizer.step()
    assert all(set(optimizers[0].state[p]) == {"step"} for p in sides[0])
    assert optimizers[0].memory_report().state_bytes == 8 * len(SHAPES)
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    feed(1, *sides)
    for optimizer in optimizers:
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(*sides, strict=True))


def test_no_momentum_has_no_codes() -> None:
    with pytest.raises(
        ConfigError, match=r"optimizer.momentum: without momentum there is no state"
    ):
        build_optimizer("sgd8bit", [torch.zeros(3, requires_grad=True)], momentum=0.0)
