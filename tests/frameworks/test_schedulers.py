"""torch's learning-rate schedules and weight averaging, held against torch.optim.AdamW.

tests/torch_api/test_schedules.py shows on every backend that changed rates and betas reach the
update; here are the schedules that it does not have, and going on in the middle of each.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

from optfactory import Optimizer2State, build_optimizer
from tests.frameworks.harness import SAMPLE, assert_close, batches, loss_of, network, weights

STEPS, STOP = 8, 3

SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, [lambda step: 0.9**step, lambda step: 0.5]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.8),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4, 5]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.3, 4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 6),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.7),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 10, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 6, 1e-4),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2, 2),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, cooldown=1),
    # Both of these cycle the first of the betas against the learning rate, too.
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 2e-2, 3, base_momentum=0.6),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, [0.02, 0.01], total_steps=STEPS + 1),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 3), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 4), lr_scheduler.CosineAnnealingLR(o, 5)], [4]
    ),
    "SWALR": lambda o: SWALR(o, [5e-3, 1e-2], anneal_epochs=5),
}

Rates = list[list[tuple[float, tuple[float, float]]]]


def groups_of(model: nn.Sequential) -> list[dict[str, Any]]:
    return [
        {"params": model[0].parameters()},
        {"params": model[2].parameters(), "lr": 2e-3, "weight_decay": 0.0},
    ]


def train(model: nn.Module, optimizer: Optimizer, schedule: Any, steps: range) -> Rates:
    """Trains, and gives the learning rate and the betas of each group at each step."""
    rates = []
    for step in steps:
        rates.append([(group["lr"], group["betas"]) for group in optimizer.param_groups])
        optimizer.zero_grad()
        loss = loss_of(model, batches(STEPS)[step])
        loss.backward()
        optimizer.step()
        if isinstance(schedule, lr_scheduler.ReduceLROnPlateau):
            schedule.step(1.0)  # a plateau
        else:
            schedule.step()
    return rates


def test_every_schedule_of_torch_is_here() -> None:
    exported = [getattr(lr_scheduler, name) for name in lr_scheduler.__all__]
    of_torch = {cls.__name__ for cls in exported if isinstance(cls, type)} - {"LRScheduler"}
    assert of_torch | {"SWALR"} == SCHEDULERS.keys()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_schedule_trains_as_with_torchs_adamw(name: str) -> None:
    ours, theirs = network(), network()
    optimizers = [
        build_optimizer("adamw", groups_of(ours)),
        torch.optim.AdamW(groups_of(theirs)),
    ]
    mine, expected = (
        train(model, optimizer, SCHEDULERS[name](optimizer), range(STEPS))
        for model, optimizer in zip((ours, theirs), optimizers, strict=True)
    )
    assert mine == expected
    assert len({rates[0] for rates in mine}) > 1
    assert_close(ours, theirs, rtol=1e-4)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_an_8bit_optimizer_goes_on_in_the_middle_of_a_schedule(name: str) -> None:
    def start() -> tuple[nn.Module, Optimizer2State, Any]:
        model = network()
        optimizer = build_optimizer("adamw8bit", groups_of(model))
        return model, optimizer, SCHEDULERS[name](optimizer)

    whole = start()
    expected = train(*whole, range(STEPS))
    first, rest = start(), start()
    rates = train(*first, range(STOP))
    for part, saved in zip(rest, first, strict=True):
        part.load_state_dict(copy.deepcopy(saved.state_dict()))
    assert rates + train(*rest, range(STOP, STEPS)) == expected
    assert weights(rest[0]) == weights(whole[0])


def test_a_schedule_made_anew_at_a_later_epoch_finds_the_initial_rates() -> None:
    def schedule(optimizer: Optimizer, last_epoch: int = -1) -> Any:
        return lr_scheduler.LambdaLR(optimizer, lambda step: 0.7**step, last_epoch)

    whole = network()
    optimizer = build_optimizer("adamw8bit", groups_of(whole))
    expected = train(whole, optimizer, schedule(optimizer), range(STEPS))

    first, rest = network(), network()
    optimizer = build_optimizer("adamw8bit", groups_of(first))
    rates = train(first, optimizer, schedule(optimizer), range(STOP))
    rest.load_state_dict(first.state_dict())
    resumed = build_optimizer("adamw8bit", groups_of(rest))
    resumed.load_state_dict(optimizer.state_dict())
    rates += train(rest, resumed, schedule(resumed, STOP - 1), range(STOP, STEPS))
    assert rates == [[(pytest.approx(lr), betas) for lr, betas in groups] for groups in expected]


@pytest.mark.parametrize("name", SAMPLE)
def test_averaging_weights_is_their_mean_and_leaves_the_training_alone(name: str) -> None:
    model, alone = network(), network()
    averaged = AveragedModel(model, use_buffers=True)
    runs = []
    for net in (model, alone):
        optimizer = build_optimizer(name, net, lr=0.01)
        runs.append((net, optimizer, SWALR(optimizer, 0.02, anneal_epochs=4)))
    history = []
    for step in range(STEPS):
        for run in runs:
            train(*run, range(step, step + 1))
        averaged.update_parameters(model)
        history.append([p.detach().double() for p in model.parameters()])
    assert weights(model) == weights(alone)
    for p, values in zip(averaged.parameters(), zip(*history, strict=True), strict=True):
        torch.testing.assert_close(p.double(), sum(values) / STEPS, rtol=1e-6, atol=1e-7)
    assert weights(averaged) != weights(model)


def test_an_exponential_average_and_batch_norm_statistics_are_made_beside_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.BatchNorm1d(96), nn.Linear(96, 64))
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizer = build_optimizer("paged_adamw8bit", model, lr=0.01)
    expected: list[torch.Tensor] = []
    for batch in batches():
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
        averaged.update_parameters(model)
        now = [p.detach().clone() for p in model.parameters()]
        expected = [e.lerp(n, 0.5) for e, n in zip(expected or now, now, strict=True)]
    for p, value in zip(averaged.parameters(), expected, strict=True):
        torch.testing.assert_close(p, value)
    update_bn(batches(), averaged)
    inputs = torch.stack([averaged.module[0](batch) for batch in batches()])
    torch.testing.assert_close(averaged.module[1].running_mean, inputs.mean((0, 1)))
