"""Schedulers with which training would fail or go wrong, and what is said of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch.optim import Optimizer, lr_scheduler

from optfactory import explain
from optfactory.errors import ConfigError
from optfactory.explaining import simulation
from tests.explaining.models import Changing, tiny

HEAD = {"head": {"match": "head.*", "lr_scale": 10}}


def node(name: str, **arguments: Any) -> dict[str, Any]:
    return {"_target_": name, **arguments}


def by(function: Callable[[int], float]) -> Callable[[Optimizer], Any]:
    return partial(lr_scheduler.LambdaLR, lr_lambda=function)


# ---- learning rates that no optimizer takes ----------------------------------------------------


@pytest.mark.parametrize(
    ("scheduler", "steps", "said"),
    [
        (node("ExponentialLR", gamma=math.nan), 9, "nan from step 1 on"),
        (node("ExponentialLR", gamma=10), 400, "inf from step 312 on"),
        (by(lambda step: 1 - step), 9, "negative from step 2 on"),
        (
            by(lambda step: -1 if step == 2 else 1),
            9,
            "negative from step 2 on, though not at every",
        ),
        (by(lambda step: -math.inf if step == 2 else 1), 3, "negative from step 2 on"),
        (by(lambda _: math.nan), 9, "nan from step 0 on"),
    ],
)
def test_rates_that_no_optimizer_takes_are_a_problem(
    scheduler: Any, steps: int, said: str, recwarn: pytest.WarningsRecorder
) -> None:
    told = explain("adam", tiny(), scheduler=scheduler, steps=steps, param_groups=HEAD)
    assert any(said in problem for problem in told.problems)
    assert all(problem.startswith("the learning rate of ") for problem in told.problems)
    assert told.warnings == ()
    assert told.problems[-1][:40] in " ".join(str(told).split())
    json.dumps(told.as_dict(), allow_nan=False)
    assert not list(recwarn)


def test_groups_that_go_wrong_alike_are_one_problem() -> None:
    told = explain("adam", tiny(), scheduler=by(lambda step: 1 - step), steps=9, param_groups=HEAD)
    assert told.problems == ("the learning rate of default, head is negative from step 2 on",)


def test_json_has_infinite_numbers_as_text() -> None:
    told = explain("adam", scheduler=node("ExponentialLR", gamma=math.inf), steps=4)
    scheduler = told.as_dict()["scheduler"]
    assert scheduler["arguments"] == {"gamma": "inf"}
    assert scheduler["rates"][0]["at"]["3"] == "inf"
    assert scheduler["rates"][0]["max"] == {"value": 0.001, "step": 0}


# ---- schedulers that raise ---------------------------------------------------------------------


def add_group(optimizer: Optimizer) -> None:
    optimizer.add_param_group({"params": [torch.zeros(1)], "lr": 1.0})


def set_rate(value: Any, optimizer: Optimizer) -> None:
    optimizer.param_groups[0]["lr"] = value


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (add_group, "it makes 3 param groups of 2"),
        (partial(set_rate, "fast"), "it sets lr to 'fast', which is no number"),
        (partial(set_rate, "0.1"), "it sets lr to '0.1', which is no number"),
        (partial(set_rate, None), "it sets lr to None, which is no number"),
        (lambda optimizer: optimizer.param_groups[0].pop("betas"), "KeyError: 'betas'"),
        (lambda optimizer: optimizer.param_groups.pop(), "it makes 1 param groups of 2"),
    ],
)
def test_what_a_scheduler_does_to_groups_is_a_problem(
    change: Callable[[Optimizer], object], said: str
) -> None:
    scheduler = partial(Changing, change=change)
    told = explain("adam", tiny(), scheduler=scheduler, steps=9, param_groups=HEAD)
    assert told.problems[0].startswith(f"Changing raises after 3 steps: {said}")
    assert told.schedule is not None
    assert told.schedule.steps == 3
    assert {len(curve.values) for curve in told.schedule.rates} == {3}


def test_groups_that_are_spoilt_from_the_start() -> None:
    def made(optimizer: Optimizer) -> Any:
        set_rate("fast", optimizer)
        return Changing(optimizer, add_group)

    told = explain("adam", tiny(), scheduler=made, param_groups=HEAD)
    assert told.problems[0].startswith("made raises after 0 steps: it sets lr to 'fast'")
    assert "scheduler made()" in str(told)
    json.dumps(told.as_dict(), allow_nan=False)


LONGER = "Make it as long as the training, or step it less often"
WRONG = "One of its arguments may be wrong"
NESTED = {
    "schedulers": [
        node("ConstantLR"),
        node("SequentialLR", schedulers=[node("ConstantLR"), node("LinearLR")], milestones=[3]),
    ],
    "milestones": [4],
}


@pytest.mark.parametrize(
    ("scheduler", "steps", "said"),
    [
        (node("OneCycleLR", max_lr=1, total_steps=9), 20, f"steps is 9. {LONGER}"),
        (node("CosineAnnealingLR", T_max=0), None, f"after 1 step: ZeroDivisionError: {{}}{WRONG}"),
        (node("StepLR", step_size=0), None, f"after 1 step: ZeroDivisionError: {{}}{WRONG}"),
        (node("SequentialLR", **NESTED), None, f"after 4 steps: NotImplementedError. {WRONG}"),
    ],
)
def test_the_remedy_fits_the_failure(
    scheduler: Mapping[str, Any], steps: int | None, said: str
) -> None:
    told = explain("adam", scheduler=scheduler, steps=steps)
    (problem,) = told.problems
    assert all(part in problem for part in said.split("{}"))
    assert problem.endswith(LONGER) == (LONGER in said)
    assert not any("rises again" in warning for warning in told.warnings)


# ---- schedules that rise -----------------------------------------------------------------------


def test_a_decay_to_more_than_there_is_at_the_start() -> None:
    told = explain("adam", scheduler=node("CosineAnnealingLR", T_max=100, eta_min=0.1))
    assert told.warnings == (
        "CosineAnnealingLR raises the learning rate of all parameters, which is 0.001, to its "
        "eta_min 0.1; all groups end there",
    )
    part = node("CosineAnnealingLR", T_max=90, eta_min=0.005)
    both = node("SequentialLR", schedulers=[node("LinearLR"), part], milestones=[10])
    told = explain("adam", tiny(), scheduler=both, param_groups=HEAD)
    assert ["of default, which is 0.001, to its eta_min 0.005" in w for w in told.warnings] == [
        True
    ]


@pytest.mark.parametrize(
    "scheduler",
    [
        node("CosineAnnealingLR", T_max=9, eta_min=1e-3),  # the same as the rate
        node("CosineAnnealingWarmRestarts", T_0=3),
        node("LinearLR", start_factor=0.1),
        node("ConstantLR"),
        node("OneCycleLR", max_lr=1, total_steps=9),
        node("CyclicLR", base_lr=1e-4, max_lr=0.1),
        node("ExponentialLR", gamma=1.5),  # in search of a learning rate
    ],
)
def test_schedules_that_may_rise(scheduler: Mapping[str, Any]) -> None:
    assert explain("adam", scheduler=scheduler, steps=9).warnings == ()


def test_the_peaks_that_are_proposed_are_the_schedulers() -> None:
    cycle = node("OneCycleLR", max_lr=0.01, total_steps=10, pct_start=0.35)
    told = explain("adam", tiny(), scheduler=cycle, param_groups=HEAD)
    assert told.schedule is not None
    assert max(told.schedule.rates[0].values) < 0.00999
    assert told.warnings[0].endswith("such as [0.001, 0.01]")


def test_a_users_own_class_of_that_name_has_no_max_lr() -> None:
    def step(self: Any) -> None:
        pass

    own = type("OneCycleLR", (), {"__init__": lambda self, optimizer: fix(optimizer), "step": step})

    def fix(optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.5

    told = explain("adam", tiny(), scheduler=own, steps=5, param_groups=HEAD)
    assert told.warnings[0].endswith("such as [0.05, 0.5]")


# ---- many steps and groups ---------------------------------------------------------------------


def test_more_than_a_million_steps_are_refused() -> None:
    with pytest.raises(ConfigError, match="at most 1,000,000, got 1000001"):
        explain("adam", scheduler="ExponentialLR", steps=1_000_001)


def test_of_a_longer_scheduler_the_first_steps_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("simulation", "explanation", "traps"):
        monkeypatch.setattr(f"optfactory.explaining.{module}.MOST", 50)
    assert simulation.MOST == 50
    told = explain("adam", scheduler=node("CosineAnnealingLR", T_max=2000))
    assert told.schedule is not None
    assert (told.schedule.steps, told.schedule.length) == (50, 2000)
    note = "the first 50 steps are told, of the 2,000 that CosineAnnealingLR is made for"
    assert (told.notes, told.as_dict()["notes"], told.warnings) == ((note,), [note], ())
    assert f"note: {note}" in str(told)


@pytest.mark.parametrize(("count", "is_short"), [(40, False), (41, True)])
def test_of_many_groups_the_first_and_the_last_are_told(count: int, is_short: bool) -> None:
    groups = [{"params": [torch.zeros(2, 2)], "lr": 0.1 + i} for i in range(count)]
    cycle = node("OneCycleLR", max_lr=0.01, total_steps=10)
    told = explain("adam", groups, scheduler=cycle)
    assert told.groups is not None
    assert len(told.groups) == len(told.as_dict()["groups"]) == count
    shown = [line for line in str(told).splitlines() if line.startswith("group ")]
    assert len(shown) == (20 if is_short else count)
    assert ("\n\n... 21 groups more; --json lists all\n\n" in str(told)) == is_short
    if is_short:
        numbers = [int(line.split()[1].rstrip(":")) for line in shown]
        assert numbers == [*range(15), *range(36, 41)]
    assert f"of 0, 1, 2, 3, 4, 5 and {count - 6} more, from 0.85" in " ".join(str(told).split())
