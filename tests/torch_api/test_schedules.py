"""Learning rates and betas that schedules change reach the update."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer, lr_scheduler

from optfactory import Optimizer2State, build_optimizer
from optfactory.errors import ConfigError
from tests.torch_api.harness import (
    assert_same_training,
    clones,
    held,
    parameters,
    train,
    weight,
)

# With bias correction and a constant gradient Adam's step is the learning rate itself.
SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=6, cycle_momentum=False),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=5),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.1, 1.0, 2), lr_scheduler.ExponentialLR(o, 0.5)],
        milestones=[2],
    ),
}


def advance(scheduler: Any, metric: float = 1.0) -> None:
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        scheduler.step(metric)
    else:
        scheduler.step()


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("schedule", SCHEDULERS.values(), ids=SCHEDULERS)
def test_a_schedule_reaches_the_update(
    schedule: Callable[[Optimizer], Any], tensor_lr: bool, backend: str
) -> None:
    p, q = weight(), weight()
    lr: Any = torch.tensor(0.1) if tensor_lr else 0.1
    optimizer = build_optimizer("adam", [{"params": [p]}, {"params": [q], "lr": 0.01}], lr=lr)
    scheduler = schedule(optimizer)
    rates = []
    for _ in range(5):
        rates.append([float(group["lr"]) for group in optimizer.param_groups])
        before = [p.detach().clone(), q.detach().clone()]
        p.grad, q.grad = torch.full_like(p, 2.0), torch.full_like(q, -3.0)
        optimizer.step()
        advance(scheduler)
        moved = [(before[0] - p).mean().item(), (q - before[1]).mean().item()]
        assert moved == pytest.approx(rates[-1], rel=1e-4, abs=1e-7)
    assert len({rate for rate, _ in rates}) >= 4


@pytest.mark.parametrize("name", ["adamw", "lamb8bit"])
def test_a_schedule_goes_on_from_a_checkpoint(name: str, backend: str) -> None:
    def start(params: list[Tensor]) -> tuple[Optimizer2State, Any]:
        optimizer = build_optimizer(name, params, lr=0.1)
        return optimizer, lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=9)

    def run(optimizer: Optimizer2State, scheduler: Any, steps: range) -> None:
        for step in steps:
            train(optimizer, range(step, step + 1))
            scheduler.step()

    one, one_schedule = start(parameters())
    run(one, one_schedule, range(4))
    other, other_schedule = start(clones(held(one)))
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    other_schedule.load_state_dict(one_schedule.state_dict())
    run(one, one_schedule, range(4, 8))
    run(other, other_schedule, range(4, 8))
    assert_same_training(one, other)
    assert one.param_groups[0]["lr"] == other.param_groups[0]["lr"]
    assert one.param_groups[0]["betas"] == other.param_groups[0]["betas"] != (0.9, 0.999)
    assert other.param_groups[0]["initial_lr"] == one.param_groups[0]["initial_lr"]


def test_a_cycled_beta_reaches_the_update(backend: str) -> None:
    p = weight()
    optimizer = build_optimizer("adam", [p], lr=0.1)
    schedule = lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=5, base_momentum=0.5)
    betas = []
    expected = torch.zeros(300)
    for step in range(4):
        betas.append(optimizer.param_groups[0]["betas"][0])
        p.grad = torch.full_like(p, float(step + 1))
        expected = betas[-1] * expected + (1 - betas[-1]) * p.grad
        optimizer.step()
        schedule.step()
        torch.testing.assert_close(optimizer.state[p]["exp_avg"], expected)
    assert len(set(betas)) >= 3


@pytest.mark.parametrize("where", ["override", "mapping", "group"])
def test_a_tensor_lr_stays_one_and_acts_when_changed_in_place(where: str, backend: str) -> None:
    p = weight()
    lr = torch.tensor(0.1)
    if where == "override":
        optimizer = build_optimizer("adam", [p], lr=lr)
    elif where == "mapping":
        optimizer = build_optimizer({"name": "adam", "lr": lr}, [p])
    else:
        optimizer = build_optimizer("adam", [{"params": [p], "lr": lr}])
    assert optimizer.param_groups[0]["lr"] is lr
    for rate in (0.1, 0.25, 0.0):
        lr.fill_(rate)
        before = p.detach().clone()
        p.grad = torch.ones_like(p)
        optimizer.step()
        assert (before - p).mean().item() == pytest.approx(rate, rel=1e-5)


@pytest.mark.parametrize("lr", [torch.tensor(-0.1), torch.tensor(torch.nan), torch.tensor(True)])
def test_a_bad_tensor_lr_is_refused(lr: Tensor) -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.lr"):
        build_optimizer("adam", [weight()], lr=lr)


def test_a_tensor_lr_survives_save_and_load() -> None:
    optimizer = build_optimizer("adam8bit", parameters(), lr=torch.tensor(0.25))
    train(optimizer, range(1))
    other = build_optimizer("adam8bit", clones(held(optimizer)), lr=torch.tensor(0.5))
    other.load_state_dict(optimizer.state_dict())
    assert isinstance(other.param_groups[0]["lr"], Tensor)
    assert other.param_groups[0]["lr"] == 0.25
    optimizer.param_groups[0]["lr"].fill_(9.0)
    assert other.param_groups[0]["lr"] == 0.25
