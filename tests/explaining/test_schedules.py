"""Schedules as explained against torch's on the real optimizer, and against arithmetic by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
from omegaconf import OmegaConf
from torch import nn
from torch.optim import Optimizer, lr_scheduler

from optfactory import build_optimizer, explain
from optfactory.errors import ConfigError
from optfactory.explaining.figures import Schedule
from optfactory.explaining.schedules import NAMES
from tests.explaining.models import halving, tiny

STEPS = 12
RULES = {"deep": {"layer_decay": 0.5}, "head": {"match": "head.*", "lr_scale": 10}}
WARMUP: dict[str, Any] = {"_target_": "LinearLR", "start_factor": 0.1, "total_iters": 4}
SCHEDULERS: dict[str, dict[str, Any]] = {
    "StepLR": {"step_size": 5, "gamma": 0.5},
    "MultiStepLR": {"milestones": [2, 7]},
    "ConstantLR": {"factor": 0.25, "total_iters": 3},
    "LinearLR": {"total_iters": 6},
    "ExponentialLR": {"gamma": 0.75},
    "PolynomialLR": {"total_iters": 9, "power": 2.0},
    "CosineAnnealingLR": {"T_max": 8, "eta_min": 1e-5},
    "CosineAnnealingWarmRestarts": {"T_0": 3, "T_mult": 2},
    "CyclicLR": {"base_lr": 1e-3, "max_lr": 0.1, "step_size_up": 4},
    "OneCycleLR": {"max_lr": 0.1, "total_steps": STEPS},
    "SequentialLR": {
        "schedulers": [WARMUP, {"_target_": "CosineAnnealingLR", "T_max": 8}],
        "milestones": [4],
    },
    "ChainedScheduler": {"schedulers": [WARMUP, {"_target_": "ExponentialLR", "gamma": 0.9}]},
}
FUNCTIONS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step),
    "MultiplicativeLR": lambda optimizer: lr_scheduler.MultiplicativeLR(optimizer, lambda _: 0.8),
    "partial": partial(lr_scheduler.CosineAnnealingLR, T_max=7),
    "own": halving,
}


def made(node: Mapping[str, Any], optimizer: Optimizer) -> Any:
    """The scheduler of a node, without the code that is tested."""
    arguments = {key: value for key, value in node.items() if key != "_target_"}
    if "schedulers" in arguments:
        arguments["schedulers"] = [made(part, optimizer) for part in arguments["schedulers"]]
    return getattr(lr_scheduler, node["_target_"])(optimizer=optimizer, **arguments)


Values = dict[str, list[float]]


def stepped(
    optimizer: Optimizer, make: Callable[[Optimizer], Any], steps: int
) -> tuple[Values, Values]:
    """The learning rates and momenta of each group of a real optimizer, step by step."""
    scheduler = make(optimizer)
    rates: Values = {group["name"]: [] for group in optimizer.param_groups}
    momenta: Values = {group["name"]: [] for group in optimizer.param_groups}
    for _ in range(steps):
        for group in optimizer.param_groups:
            rates[group["name"]].append(group["lr"])
            momenta[group["name"]].append(
                group["betas"][0] if "betas" in group else group["momentum"]
            )
        optimizer.step()  # without gradients: rates and momenta are checked and read
        scheduler.step()
    return rates, momenta


def schedule_of(*args: Any, **kwargs: Any) -> Schedule:
    schedule = explain(*args, **kwargs).schedule
    assert schedule is not None
    return schedule


def by_group(schedule: Schedule, kind: str) -> Values:
    return {
        group: list(curve.values) for curve in getattr(schedule, kind) for group in curve.groups
    }


def assert_as_stepped(
    name: str, given: Any, make: Callable[[Optimizer], Any], **overrides: Any
) -> None:
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(3)])
    model = nn.ModuleDict({"blocks": model, "head": nn.Linear(2, 2)})
    schedule = schedule_of(name, model, scheduler=given, steps=STEPS, lr=0.01, **overrides)
    optimizer = build_optimizer(name, model, lr=0.01, **overrides)
    rates, momenta = stepped(optimizer, make, STEPS)
    assert (schedule.steps, schedule.failure) == (STEPS, "")
    assert by_group(schedule, "rates") == rates
    found = by_group(schedule, "momenta")
    starts = {group.name: group for group in explain(name, model, **overrides).groups or ()}
    for group, values in momenta.items():
        own = starts[group].values
        start = own["betas"][0] if "betas" in own else own["momentum"]
        assert found.get(group, [start] * STEPS) == values


def test_every_schedule_of_torch_is_compared() -> None:
    assert {*SCHEDULERS, *FUNCTIONS, "ReduceLROnPlateau"} >= set(NAMES)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_rates_and_momenta_are_those_of_the_real_optimizer(name: str) -> None:
    node = {"_target_": name, **SCHEDULERS[name]}
    assert_as_stepped("adamw8bit", node, partial(made, node), param_groups=RULES)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_called_with_the_optimizer(name: str) -> None:
    assert_as_stepped("lion", FUNCTIONS[name], FUNCTIONS[name], param_groups=RULES)


@pytest.mark.parametrize("name", ["sgd", "muon"])
def test_momentum_is_cycled_as_in_the_real_optimizer(name: str) -> None:
    node = {"_target_": "OneCycleLR", "max_lr": 0.1, "total_steps": STEPS}
    assert_as_stepped(name, node, partial(made, node), param_groups=RULES)
    told = explain("muon", tiny(), scheduler=node)
    assert any("whose betas stay: others" in text for text in told.warnings)


def test_a_path_is_imported() -> None:
    path = "tests.explaining.models.halving"
    schedule = schedule_of("adam", lr=0.5, scheduler={"_target_": path, "every": 2}, steps=5)
    assert schedule.rates[0].values == (0.5, 0.5, 0.25, 0.25, 0.125)
    assert (schedule.name, dict(schedule.arguments)) == ("halving", {"every": 2})


def test_a_node_of_omegaconf_is_a_mapping() -> None:
    config = OmegaConf.create({"n": 7, "node": {"_target_": "CosineAnnealingLR", "T_max": "${n}"}})
    schedule = schedule_of("adam", scheduler=config.node)
    assert (schedule.steps, dict(schedule.arguments)) == (7, {"T_max": 7})


def test_cosine_by_hand() -> None:
    node = {"_target_": "torch.optim.lr_scheduler.CosineAnnealingLR", "T_max": 100}
    schedule = schedule_of("adamw", tiny(), lr=0.002, param_groups=RULES, scheduler=node)
    assert schedule.steps == schedule.length == 100
    assert schedule.keeps_ratios
    for curve in schedule.rates:
        for step, value in enumerate(curve.values):
            expected = curve.configured[0] * (1 + math.cos(math.pi * step / 100)) / 2
            assert math.isclose(value, expected, rel_tol=1e-9)


# ---- what is told ------------------------------------------------------------------------------

HEAD = {"head": {"match": "head.*", "lr_scale": 10}}


def test_one_peak_for_all_groups_undoes_lr_scale() -> None:
    node: dict[str, Any] = {"_target_": "OneCycleLR", "max_lr": 0.05, "total_steps": 20}
    told = explain("adamw", tiny(), param_groups=HEAD, scheduler=node)
    assert told.schedule is not None
    (curve,) = told.schedule.rates
    assert curve.groups == ("default", "head")
    assert curve.configured == (0.001, 0.01)
    (warning,) = told.warnings
    assert "makes the learning rates of all groups equal, which undoes lr_scale" in warning
    assert "[0.005, 0.05]" in warning
    inside = explain(
        "adamw", tiny(), param_groups=HEAD, scheduler=lambda optimizer: made(node, optimizer)
    )
    assert inside.warnings == told.warnings
    again = explain("adamw", tiny(), param_groups=HEAD, scheduler={**node, "max_lr": [0.005, 0.05]})
    assert again.schedule is not None
    assert again.schedule.keeps_ratios
    assert again.warnings == ()
    assert any("betas[0]) of default, head, from 0.85 to 0.95" in x for x in again.schedule.told)


@pytest.mark.parametrize("eta_min", [0.0, 1e-4])
def test_ratios_between_groups(eta_min: float) -> None:
    node = {"_target_": "CosineAnnealingLR", "T_max": 50, "eta_min": eta_min}
    schedule = schedule_of("adamw", tiny(), param_groups=HEAD, scheduler=node)
    assert schedule.keeps_ratios == (eta_min == 0)
    (sentence,) = schedule.told
    if eta_min:
        assert "of head to default it is 10 in the config, 10 at the first step, 1." in sentence
    else:
        assert sentence.endswith("stay as the config has them.")


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        (100, ""),
        (101, ""),
        (150, "rises again after step 100, to 0.0004843 at the last of 150: it is made for 100"),
        (60, "is made for 100 steps, and after 60 the learning rate is 0.000"),
    ],
)
def test_a_cosine_of_another_length_than_the_training(steps: int, said: str) -> None:
    node = {"_target_": "CosineAnnealingLR", "T_max": 100}
    told = explain("adam", scheduler=node, steps=steps)
    assert [said in warning for warning in told.warnings] == ([True] if said else [])
    assert told.problems == ()


@pytest.mark.parametrize("name", ["CyclicLR", "CosineAnnealingWarmRestarts", "StepLR"])
def test_schedules_that_are_meant_to_rise_or_stay_are_no_trap(name: str) -> None:
    assert explain("adam", scheduler={"_target_": name, **SCHEDULERS[name]}).warnings == ()


def test_a_scheduler_that_raises_is_a_problem() -> None:
    node = {"_target_": "OneCycleLR", "max_lr": 0.05, "total_steps": 20}
    assert explain("adam", scheduler=node, steps=20).problems == ()
    told = explain("adam", scheduler=node, steps=30)
    (problem,) = told.problems
    assert problem.startswith("OneCycleLR raises after 21 steps: ValueError: Tried to step 21")
    assert told.schedule is not None
    assert len(told.schedule.rates[0].values) == told.schedule.steps == 21


def test_metrics_are_not_simulated() -> None:
    node = {"_target_": "ReduceLROnPlateau", "patience": 3, "factor": 0.5, "min_lr": 1e-6}
    schedule = schedule_of("adam", tiny(), scheduler=node)
    assert (schedule.steps, schedule.rates, dict(schedule.milestones)) == (0, (), {})
    assert "more than 3 calls of step(metric)" in schedule.told[0]
    assert "multiplied by 0.5, each group's down to 1e-06" in schedule.told[0]


@pytest.mark.parametrize(
    ("node", "steps"),
    [
        ({"_target_": "CosineAnnealingLR", "T_max": 7}, 7),
        ({"_target_": "OneCycleLR", "max_lr": 1, "epochs": 3, "steps_per_epoch": 4}, 12),
        ({"_target_": "PolynomialLR", "total_iters": 30}, 30),
        ({"_target_": "SequentialLR", **SCHEDULERS["SequentialLR"]}, 12),
        ({"_target_": "ExponentialLR", "gamma": 0.9}, 1000),
        ("tests.explaining.models.halving", 1000),
    ],
)
def test_how_many_steps_are_run(node: Any, steps: int) -> None:
    assert schedule_of("adam", scheduler=node).steps == steps
    assert schedule_of("adam", scheduler=node, steps=5).steps == 5


def test_milestones_are_few_and_have_the_peak_and_every_drop() -> None:
    node = {"_target_": "OneCycleLR", "max_lr": 1, "total_steps": 1000, "pct_start": 0.2}
    milestones = schedule_of("adam", scheduler=node).milestones
    assert milestones == {0: "first", 199: "peak", 500: "", 999: "last"}
    node = {"_target_": "MultiStepLR", "milestones": [30, 80]}
    assert list(schedule_of("adam", scheduler=node, steps=100).milestones) == [0, 30, 50, 80, 99]


# ---- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("CosineAnealing", "Did you mean 'CosineAnnealingLR'"),
        ("LRScheduler", "no scheduler 'LRScheduler'"),
        ("cosineannealinglr", "Did you mean 'CosineAnnealingLR'"),
        ("SWALR", "torch has it as torch.optim.swa_utils.SWALR"),
        ("torch.optim.lr_scheduler.steplr", "Did you mean 'StepLR'"),
        ("CosineAnnealingLR", r"missing .*'T_max'; it takes T_max, eta_min=0.0"),
        ({"_target_": "StepLR", "step": 3}, r"unexpected keyword argument 'step'; it takes"),
        ({"_target_": "StepLR", "_args_": [3]}, "give the arguments by their names"),
        ({"step_size": 3}, "needs _target_"),
        ({"_target_": "LambdaLR", "lr_lambda": "x"}, "a function, which text cannot give"),
        ("no.such.module", "cannot be loaded: ModuleNotFoundError"),
        ("tests.explaining.models.number", "is an int, not a function or class"),
        ("tests.explaining.models.tiny", "takes no arguments|cannot be made"),
        (lr_scheduler.StepLR, "missing .*'step_size'; it takes step_size, gamma=0.1"),
        (3, "is a name of torch.optim.lr_scheduler"),
        (lambda optimizer: 3, "made an int, which has no method step"),
    ],
)
def test_what_is_wrong_with_a_scheduler_is_said(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        explain("adam", scheduler=given)


@pytest.mark.parametrize("steps", [0, -1, 1.5, "many", True])
def test_numbers_of_steps_are_checked(steps: Any) -> None:
    with pytest.raises(ConfigError, match="steps is a number of at least 1"):
        explain("adam", scheduler="ExponentialLR", steps=steps)


def test_an_optimizer_without_momentum_is_refused_as_by_torch() -> None:
    node = {"_target_": "OneCycleLR", "max_lr": 1, "total_steps": 9}
    with pytest.raises(ConfigError, match="optimizer must support momentum or beta1"):
        explain("adagrad", scheduler=node)
