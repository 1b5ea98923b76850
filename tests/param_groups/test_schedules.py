"""Scales of rules are part of the learning rate, so torch's schedulers keep the ratios."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import Optimizer, lr_scheduler

from tests.param_groups.harness import Net, Rules, built, copy_of, give_gradients

RULES: Rules = {
    "head": {"match": "head.*", "lr_scale": 8.0},
    "layers": {"layer_decay": 0.5},
}
# What each parameter's rate is, as a multiple of the base rate.
FACTORS = {"layers[0]": 1 / 8, "layers[1]": 1 / 4, "layers[2]": 1 / 2, "layers[3]": 1.0}
FACTORS["head+layers[3]"] = 8.0


def peaks(optimizer: Optimizer) -> list[float]:
    return [2 * float(group["lr"]) for group in optimizer.param_groups]


SCHEDULES: dict[str, Callable[[Optimizer], Any]] = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.5),
    "step": lambda o: lr_scheduler.StepLR(o, 2, 0.1),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=6),
    "warm restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, total_iters=9, power=2.0),
    # One number as max_lr would be every group's; of each group's own rate it is a multiple.
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, peaks(o), total_steps=8),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.1, 1.0, 2), lr_scheduler.CosineAnnealingLR(o, 5)],
        milestones=[2],
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 3), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
}
schedules = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())


def advance(scheduler: Any) -> None:
    plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
    scheduler.step(*([1.0] if plateau else []))


@schedules
@pytest.mark.parametrize("tensor", [False, True], ids=["float", "tensor"])
def test_a_schedule_keeps_the_ratios(schedule: Callable[[Optimizer], Any], tensor: bool) -> None:
    optimizer = built(Net(), RULES, lr=torch.tensor(0.25) if tensor else 0.25)
    scheduler = schedule(optimizer)
    seen = set()
    for _ in range(7):
        optimizer.step()
        rates = {group["name"]: float(group["lr"]) for group in optimizer.param_groups}
        assert set(rates) == set(FACTORS)
        base = rates["layers[3]"]
        for name, rate in rates.items():
            assert rate == pytest.approx(FACTORS[name] * base, rel=1e-5, abs=1e-12), name
        assert all(isinstance(g["lr"], torch.Tensor) is tensor for g in optimizer.param_groups)
        seen.add(round(base, 9))
        advance(scheduler)
    assert len(seen) > 1


@schedules
def test_a_schedule_over_rules_goes_on_after_a_checkpoint(
    schedule: Callable[[Optimizer], Any],
) -> None:
    def made(model: Net) -> tuple[Any, Any]:
        optimizer = built(model, RULES, lr=0.25)
        return optimizer, schedule(optimizer)

    model = Net()
    optimizer, scheduler = made(model)
    for step in range(3):
        give_gradients(model, step)
        optimizer.step()
        advance(scheduler)
    other = copy_of(model)
    assert isinstance(other, Net)
    resumed, resumed_scheduler = made(other)
    resumed_scheduler.load_state_dict(scheduler.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    for step in range(3, 6):
        for one, opt, sch in ((model, optimizer, scheduler), (other, resumed, resumed_scheduler)):
            give_gradients(one, step)
            opt.step()
            advance(sch)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    rates = [[group["lr"] for group in opt.param_groups] for opt in (optimizer, resumed)]
    assert rates[0] == rates[1]
