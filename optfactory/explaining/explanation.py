"""`explain`: a config as the optimizer understands it, for a model and a scheduler."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from optfactory.config.group_rules import rules_of
from optfactory.config.schema import OptimizerConfig
from optfactory.errors import ConfigError
from optfactory.explaining import traps
from optfactory.explaining.cells import counted
from optfactory.explaining.figures import Curve, Figures, Group, Schedule
from optfactory.explaining.groups import groups_of
from optfactory.explaining.schedules import Scheduler, read_scheduler
from optfactory.explaining.simulation import (
    MOST,
    curves,
    groups_alone,
    momentum_of,
    run,
    values_of_groups,
)
from optfactory.explaining.sources import Given, keys_of
from optfactory.explaining.text import render
from optfactory.factory import resolve, without_omegaconf
from optfactory.group_schema import others_rule
from optfactory.groups.grouping import group_parameters
from optfactory.groups.parameters import Params
from optfactory.planning.memory_plan import read_device

if TYPE_CHECKING:
    from omegaconf import DictConfig

_FEW = 6  # changes of a learning rate that goes in steps, which are all told
# The one group that there is without a model: without rules, and with.
ALL, REST = "all parameters", "where no rule matches"


class Explanation(Figures):
    """A config as the optimizer understands it, which str() shows as tables."""

    def __str__(self) -> str:
        return render(self)


def explain(
    cfg: str | Mapping[str, Any] | DictConfig | OptimizerConfig,
    model: nn.Module | Params | None = None,
    /,
    *,
    scheduler: str | Mapping[str, Any] | DictConfig | Callable[[Optimizer], Any] | None = None,
    steps: int | None = None,
    device: str | torch.device | None = None,
    **overrides: Any,
) -> Explanation:
    """Say of a config where each value comes from, and what each param group will have.

    >>> import torch, optfactory
    >>> with torch.device("meta"):
    ...     model = torch.nn.Linear(4096, 4096)
    >>> rules = {"bias": {"ndim": 1, "lr_scale": 2}}
    >>> told = optfactory.explain("adamw8bit", model, lr="3e-4", param_groups=rules)
    >>> [(key.key, key.value, key.source) for key in told.keys if key.source != "default"][:2]
    [('name', 'adamw8bit', 'name'), ('lr', 0.0003, 'override')]
    >>> [(group.name, group.rate.value) for group in told.groups]
    [('default', 0.0003), ('bias', 0.0006)]

    With a scheduler, it tells the learning rate of each group over the steps:

    >>> cosine = {"_target_": "CosineAnnealingLR", "T_max": 100}
    >>> told = optfactory.explain("adamw8bit", lr=0.5, scheduler=cosine)
    >>> [round(told.schedule.rates[0].values[step], 3) for step in (0, 50, 99)]
    [0.5, 0.25, 0.0]

    Args:
        cfg: as for `build_optimizer`, with its overrides.
        model: a Module, which may be on the meta device, or what else `build_optimizer` takes.
            Without one nothing is said of param groups.
        scheduler: a name of torch.optim.lr_scheduler or a dotted path; a mapping with that under
            ``_target_``, and arguments; or a function that takes the optimizer, as
            ``functools.partial(CosineAnnealingLR, T_max=100)``.
        steps: how many steps of the scheduler, up to a million; by default as many as it is made
            for, else 1000.
        device: where the model will be, e.g. ``cuda``; by default where it is, and the CPU for a
            model on the meta device.

    Raises:
        ConfigError: the config, the parameters or the scheduler are refused. Rules that match
            nothing, and what a scheduler raises at a later step, are `problems` instead.
    """
    config = resolve(cfg, **overrides)
    given = Given.from_python(cfg, overrides)
    scheduler = without_omegaconf(scheduler)
    read = None if scheduler is None else read_scheduler(scheduler, is_trusted=True)
    return explained(config, given, model, read, steps=steps, device=device)


def explained(
    config: OptimizerConfig,
    given: Given,
    model: nn.Module | Params | None,
    scheduler: Scheduler | None,
    *,
    steps: int | None,
    device: str | torch.device | None,
    notes: Sequence[str] = (),
) -> Explanation:
    """The explanation of a config that was read already; see `explain`.

    Args:
        notes: what was left out so far.

    Raises:
        ConfigError: as `explain`.
    """
    read_steps(steps)
    target = read_device(device)
    groups: tuple[Group, ...] | None = None
    warned: list[str] = []
    problems: list[str] = []
    if model is not None:
        grouping = group_parameters(model, config)
        groups = groups_of(grouping, config, target)
        warned += traps.of_grouping(grouping, values_of_groups(groups))
        problems += grouping.unmatched.values()
    schedule = None
    if scheduler is not None:
        schedule, more = _schedule(scheduler, config, groups, steps)
        warned += more
        problems += traps.of_rates(schedule.rates)
        if schedule.failure:
            problems.append(_failed(schedule))
        if (schedule.length or 0) > schedule.steps == MOST:
            length = f"the {schedule.length:,} that {schedule.name} is made for"
            notes = [*notes, f"the first {MOST:,} steps are told, of {length}"]
    return Explanation(
        config=config,
        source=given.text,
        keys=keys_of(config, given),
        groups=groups,
        schedule=schedule,
        warnings=tuple(warned),
        problems=tuple(problems),
        notes=tuple(notes),
    )


def read_steps(steps: object) -> None:
    """Check the number of steps.

    Raises:
        ConfigError: it is none.
    """
    if steps is not None and (type(steps) is not int or not 1 <= steps <= MOST):
        raise ConfigError(f"steps is a number of at least 1 and at most {MOST:,}, got {steps!r}")


def _schedule(
    scheduler: Scheduler,
    config: OptimizerConfig,
    groups: Sequence[Group] | None,
    steps: int | None,
) -> tuple[Schedule, list[str]]:
    """What a scheduler does to the groups, and what was perhaps not meant."""
    rest = REST if rules_of(config) or others_rule(config) else ALL
    names = [rest] if groups is None else [group.name for group in groups]
    values = groups_alone(config) if groups is None else values_of_groups(groups)
    done = run(scheduler, config, values, steps)
    rates = curves(names, [group["lr"] for group in values], done.rates)
    momenta = curves(names, [momentum_of(group, group) or 0.0 for group in values], done.momenta)
    momenta = tuple(curve for curve in momenta if curve.varies)
    keeps = bool(rates) and traps.keeps_ratios(rates)
    schedule = Schedule(
        name=scheduler.name,
        arguments=scheduler.arguments,
        steps=done.steps,
        length=done.length,
        rates=rates,
        momenta=momenta,
        milestones=_milestones(rates, done.steps),
        keeps_ratios=keeps,
        failure=done.failure,
        told=traps.told(done, keeps, rates, momenta),
    )
    return schedule, traps.of_schedule(scheduler, done, rates, names)


def _failed(schedule: Schedule) -> str:
    remedy = "One of its arguments may be wrong"
    if schedule.length is not None and schedule.steps >= schedule.length:
        remedy = "Make it as long as the training, or step it less often"
    steps = counted(schedule.steps, "step")
    return f"{schedule.name} raises after {steps}: {schedule.failure}. {remedy}"


def _milestones(rates: Sequence[Curve], steps: int) -> dict[int, str]:
    """The steps that tell most of the curves, and what happens there."""
    if not steps:
        return {}
    found: dict[int, str] = {steps // 2: "", steps - 1: "last"}
    for curve in rates:
        values = curve.values
        jumps = [step for step in range(1, steps) if values[step] != values[step - 1]]
        if len(jumps) <= _FEW:
            found |= dict.fromkeys(jumps, "")
        lowest, peak = curve.extremes()
        if 0 < lowest < steps - 1:
            found[lowest] = "lowest"
        if 0 < peak < steps - 1:
            found[peak] = "peak"
    return dict(sorted({**found, 0: "first"}.items()))
