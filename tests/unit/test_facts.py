"""Changes of tensors between two steps are noticed, with torch's guard or without."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from optfactory import build_optimizer
from optfactory.step import facts
from optfactory.step.facts import Facts

CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "shape": lambda x: x[:3],
    "dtype": lambda x: x.double(),
    "device": lambda x: x.to("meta"),
    "layout": lambda x: x.to_sparse(),
}


@pytest.fixture(params=["guard", "no guard"], autouse=True)
def guard(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param == "no guard":
        monkeypatch.setattr(facts, "_guard", lambda tensors: None)
    return bool(request.param == "guard")


def settled(parameters: list[Tensor], gradients: list[Tensor | None]) -> Facts:
    """Facts that held twice, so that the guard is in use."""
    known = Facts(parameters, gradients)
    assert known.hold(parameters, gradients)
    assert known.hold(parameters, gradients)
    return known


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_gradient_is_noticed(change: str) -> None:
    parameters = [torch.ones(4, 6), torch.ones(5)]
    gradients: list[Tensor | None] = [torch.ones(4, 6), torch.ones(5)]
    known = settled(parameters, gradients)
    assert not known.hold(parameters, [CHANGES[change](torch.ones(4, 6)), gradients[1]])


@pytest.mark.parametrize("change", ["shape", "dtype", "device"])
def test_a_changed_parameter_is_noticed(change: str) -> None:
    parameters = [torch.ones(4, 6), torch.ones(5)]
    gradients: list[Tensor | None] = [None, torch.ones(5)]
    known = settled(parameters, gradients)
    assert not known.hold([CHANGES[change](parameters[0]), parameters[1]], gradients)


def test_other_gradients_that_are_absent_are_noticed() -> None:
    parameters = [torch.ones(4), torch.ones(4)]
    known = settled(parameters, [None, torch.ones(4)])
    assert not known.hold(parameters, [torch.ones(4), None])


def test_strides_are_known_to_be_the_same_only_while_they_are(guard: bool) -> None:
    parameters: list[Tensor] = [torch.ones(4, 6)]
    known = settled(parameters, [torch.ones(4, 6)])
    before = known.strides
    assert (before is not None) == guard
    assert known.hold(parameters, [torch.zeros(4, 6)])
    assert known.strides is before
    assert known.hold(parameters, [torch.ones(6, 4).t()])
    assert known.strides is None or known.strides is not before


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "lamb8bit"])
def test_gradients_that_change_their_strides_are_read_as_they_lie(name: str) -> None:
    def trained(transposed: bool) -> Tensor:
        p = torch.linspace(-1, 1, 80 * 70).view(80, 70).requires_grad_()
        optimizer = build_optimizer(name, [p], lr=0.1)
        for step in range(6):
            g = torch.arange(80 * 70.0).view(80, 70).sub(2000 * step).sin()
            p.grad = g.t().contiguous().t() if transposed and step % 3 == 2 else g
            optimizer.step()
        return p.detach()

    assert torch.equal(trained(transposed=True), trained(transposed=False))


def test_a_step_between_that_failed_or_was_skipped_leaves_nothing_stale() -> None:
    p = torch.ones(80, 70, requires_grad=True)
    other = torch.ones(5, requires_grad=True)
    optimizer = build_optimizer("adamw", [p, other], lr=0.1, nonfinite="skip_step")
    reference = build_optimizer("adamw", [q := torch.ones(80, 70, requires_grad=True)], lr=0.1)
    plain = torch.arange(80 * 70.0).view(80, 70).sin()
    for step, gradient in enumerate([plain, plain, plain.t().contiguous().t()]):
        p.grad, q.grad = gradient, gradient
        # The step in which the strides change is skipped first.
        other.grad = torch.full((5,), torch.inf if step == 2 else 1.0)
        optimizer.step()
        if step < 2:
            reference.step()
    other.grad = torch.ones(5)
    optimizer.step()
    reference.step()
    assert torch.equal(p, q)
