"""Users reset `optimizer.state` or replace its tensors; a kernel must never see the old ones."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
from torch import Tensor

from optfactory import Optimizer2State, build_optimizer
from optfactory.errors import StateError
from tests.conftest import has_compiler

needs_compiler = pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")

SHAPE = (70, 64)


def trained(steps: int) -> tuple[Tensor, Optimizer2State]:
    p = torch.linspace(-1, 1, 70 * 64).view(SHAPE).requires_grad_()
    optimizer = build_optimizer("adam8bit", [p], lr=0.1)
    for _ in range(steps):
        step(p, optimizer)
    return p, optimizer


def step(p: Tensor, optimizer: Optimizer2State, sign: float = 1.0) -> None:
    p.grad = torch.full_like(p, sign)
    optimizer.step()


def test_an_emptied_state_starts_afresh(backend: str) -> None:
    p, optimizer = trained(steps=3)
    q = p.detach().clone().requires_grad_()
    fresh = build_optimizer("adam8bit", [q], lr=0.1)
    optimizer.state = defaultdict(dict)
    step(p, optimizer, sign=-1.0)
    step(q, fresh, sign=-1.0)
    assert torch.equal(p, q)
    assert optimizer.state[p]["step"] == 1


def test_a_replaced_state_tensor_is_the_one_updated(backend: str) -> None:
    p, optimizer = trained(steps=3)
    old = optimizer.state[p]["exp_avg_q8"]
    new = optimizer.state[p]["exp_avg_q8"] = old.clone()
    before = old.clone()
    step(p, optimizer, sign=-10.0)  # turns the first moment negative, so that its codes change
    assert torch.equal(old, before)
    assert not torch.equal(new, before)


@needs_compiler
@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (torch.zeros(3, dtype=torch.uint8), r"expected shape \(70, 64\), got \(3,\)"),
        (torch.zeros(SHAPE), "expected torch.uint8, got torch.float32"),
        (torch.zeros(64, 70, dtype=torch.uint8).t(), "expected a contiguous tensor"),
        ([1, 2], "expected a tensor, got list"),
    ],
)
def test_a_state_that_does_not_fit_is_named(
    wrong: object, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPTFACTORY_BACKEND", "cpu")
    p, optimizer = trained(steps=1)
    before = p.detach().clone()
    optimizer.state[p]["exp_avg_q8"] = wrong
    with pytest.raises(StateError, match=f"'exp_avg_q8' of .*: {reason}"):
        step(p, optimizer)
    assert torch.equal(p, before)
    assert optimizer.state[p]["step"] == 1


@needs_compiler
def test_a_missing_state_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPTFACTORY_BACKEND", "cpu")
    p, optimizer = trained(steps=1)
    del optimizer.state[p]["exp_avg_sq_absmax"]
    with pytest.raises(StateError, match="has the keys"):
        step(p, optimizer)
