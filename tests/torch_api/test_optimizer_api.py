"""The result is a torch.optim.Optimizer: what torch users do with one works here too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from optfactory import Optimizer2State, build_optimizer, get_optimizer_info, list_optimizers
from tests.torch_api.harness import (
    assert_same_training,
    bits,
    held,
    parameters,
    snapshot,
    train,
    weight,
)

NAMES = list_optimizers()


@pytest.mark.parametrize("name", NAMES)
def test_every_name_builds_a_torch_optimizer(name: str) -> None:
    p = weight(70, 80)
    optimizer = build_optimizer(name, [p])
    assert type(optimizer) is Optimizer2State
    assert isinstance(optimizer, Optimizer)
    assert optimizer.param_groups[0]["params"] == [p]
    assert optimizer.defaults.keys() <= optimizer.param_groups[0].keys()
    assert "lr" in optimizer.defaults
    assert not optimizer.state
    assert "Optimizer2State" in repr(optimizer)
    assert f"lr: {get_optimizer_info(name).defaults['lr']}\n" in repr(optimizer)


# ---- steps ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adam", "lamb8bit"])
def test_a_closure_gives_the_loss_and_fresh_gradients(name: str, backend: str) -> None:
    p = weight(70, 80)
    optimizer = build_optimizer(name, [p])
    calls = []

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        calls.append(loss.item())
        return loss

    for _ in range(3):
        loss = optimizer.step(closure)
        assert isinstance(loss, Tensor)
        assert loss.item() == calls[-1]
    assert len(calls) == 3
    assert calls[0] > calls[1] > calls[2]
    assert optimizer.step() is None


def test_a_failing_closure_changes_nothing() -> None:
    optimizer = build_optimizer("adam", [weight()])
    train(optimizer, range(1))
    before = snapshot(optimizer)

    def closure() -> float:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        optimizer.step(closure)
    assert snapshot(optimizer) == before


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_is_torchs(set_to_none: bool) -> None:
    p = weight()
    optimizer = build_optimizer("adam", [p])
    p.grad = torch.ones_like(p)
    optimizer.zero_grad(set_to_none=set_to_none)
    assert p.grad is None if set_to_none else torch.equal(p.grad, torch.zeros(300))


@pytest.mark.parametrize("name", ["adam", "adamw8bit", "lamb"])
def test_parameters_without_gradients_are_left_alone_and_count_their_own_steps(
    name: str, backend: str
) -> None:
    params = [weight(70, 80), weight(70, 80), weight(70, 80)]
    optimizer = build_optimizer(name, params)
    given = [(0, 1), (1,), (), (0, 1, 2)]
    for chosen in given:
        before = [bits(p) for p in params]
        optimizer.zero_grad()
        for index in chosen:
            params[index].grad = torch.ones_like(params[index])
        optimizer.step()
        for index, p in enumerate(params):
            assert (bits(p) == before[index]) == (index not in chosen)
    assert [optimizer.state[p]["step"] for p in params] == [2, 3, 1]
    # A parameter's first step is the same whenever it comes.
    fresh = weight(70, 80)
    single = build_optimizer(name, [fresh])
    fresh.grad = torch.ones_like(fresh)
    single.step()
    assert bits(params[2]) == bits(fresh)


def test_a_step_without_any_gradient_does_nothing(backend: str) -> None:
    p = weight()
    before = bits(p)
    optimizer = build_optimizer("adam8bit", [p])
    optimizer.step()
    assert bits(p) == before
    assert optimizer.state[p].get("step", 0) == 0


def test_gradients_are_not_changed(backend: str) -> None:
    for name in ("adam", "lamb8bit"):
        optimizer = build_optimizer(name, parameters(), weight_decay=0.1)
        params = held(optimizer)
        for p in params:
            p.grad = torch.full_like(p, 0.5)
        grads = [p.grad for p in params]
        optimizer.step()
        for p, grad in zip(params, grads, strict=True):
            assert p.grad is grad
            assert (grad == 0.5).all()


def test_new_gradient_tensors_and_new_parameter_memory_are_followed(backend: str) -> None:
    one, other = (build_optimizer("adamw8bit", parameters()) for _ in range(2))
    for step in range(4):
        train(one, range(step, step + 1))
        for p in held(other):
            p.data = p.detach().clone()  # as FSDP and .to() do
        train(other, range(step, step + 1))
    assert_same_training(one, other)


def test_autograd_records_nothing_of_a_step(backend: str) -> None:
    p = weight(70, 80)
    optimizer = build_optimizer("adam8bit", [p])
    for _ in range(2):
        p.grad = torch.ones(70, 80)
        optimizer.step()
    assert p.is_leaf
    assert p.requires_grad
    assert all(not t.requires_grad for t in optimizer.state[p].values())


def test_a_step_is_seen_by_autograd_as_an_in_place_change(backend: str) -> None:
    p = weight()
    optimizer = build_optimizer("adam", [p])
    loss = (p * p).sum()
    p.grad = torch.ones_like(p)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_may_be_views_and_strided(backend: str) -> None:
    expected, p = weight(64, 70), weight(64, 70)
    grad = torch.randn(70, 64)
    for parameter, g in ((expected, grad.t().contiguous()), (p, grad.t())):
        optimizer = build_optimizer("adam8bit", [parameter])
        parameter.grad = g
        optimizer.step()
    assert bits(expected) == bits(p)
