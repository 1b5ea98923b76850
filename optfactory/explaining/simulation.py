"""The learning rates that a scheduler gives each group, by torch's own arithmetic.

The scheduler runs on an optimizer that has the groups with their hyperparameters, and one number to
train in each, so that it finds what it would find in the real one.
"""

from __future__ import annotations

import warnings
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from optfactory.config.group_rules import WHOLE_FIELDS
from optfactory.config.schema import OptimizerConfig
from optfactory.explaining.figures import Curve, Group
from optfactory.explaining.schedules import PLATEAU, Scheduler, length_of

_STEPS = 1000  # where neither the user nor the scheduler says how many
MOST = 1_000_000  # steps that are run


@dataclass(frozen=True)
class Run:
    """What a scheduler did.

    Attributes:
        scheduler: after the last step.
        steps: how many were run.
        length: how many it is made for, if it says so.
        rates: the learning rate of each group at each step.
        momenta: the same of its momentum, or of the first of its betas; empty where it has none.
        strays: the groups in which it sets a momentum that their optimizers do not have.
        failure: what it raised; else empty.
        warned: what torch warned of.
    """

    scheduler: Any
    steps: int
    length: int | None
    rates: list[array[float]]
    momenta: list[array[float]]
    strays: tuple[int, ...]
    failure: str
    warned: tuple[str, ...]

    @property
    def kind(self) -> str:
        """The scheduler's class, whatever function made it."""
        return type(self.scheduler).__name__


class _StandIn(Optimizer):
    """Groups with their hyperparameters, and one number in each, which no step changes."""

    def __init__(self, groups: Sequence[Mapping[str, Any]], defaults: dict[str, Any]) -> None:
        numbers = [
            {**group, "params": [torch.zeros(1, dtype=torch.float32, device="cpu")]}
            for group in groups
        ]
        super().__init__(numbers, defaults)
        for group, stated in zip(self.param_groups, groups, strict=True):
            # What torch filled in from another family, as the real optimizer drops it.
            for key in self.defaults.keys() - stated.keys():
                del group[key]

    def step(self, closure: Any = None) -> Any:
        """Nothing: schedulers only want to see that it was called."""


def run(
    scheduler: Scheduler,
    config: OptimizerConfig,
    groups: Sequence[Mapping[str, Any]],
    steps: int | None,
) -> Run:
    """Run a scheduler as a training loop does: a step of the optimizer, then one of the scheduler.

    Args:
        groups: the hyperparameters of each param group.
        steps: how many; by default as many as the scheduler is made for.

    Raises:
        ConfigError: the scheduler cannot be made.
    """
    defaults = config.model_dump(exclude={"name", *WHOLE_FIELDS})
    optimizer = _StandIn(groups, defaults)
    rates: list[array[float]] = [array("d") for _ in groups]
    momenta: list[array[float]] = [array("d") for _ in groups]
    failure = ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = scheduler.make(optimizer)
        length = length_of(made, scheduler.arguments)
        wanted = min(steps or length or _STEPS, MOST)
        count = 0 if type(made).__name__ == PLATEAU else wanted
        done = 0
        while done < count and not failure:
            try:
                now = _read(optimizer, groups)
                done += 1
                for index, (rate, momentum) in enumerate(now):
                    rates[index].append(rate)
                    momenta[index].extend([] if momentum is None else [momentum])
                optimizer.step()
                made.step()
            # Whatever a scheduler raises at its end, or in a function of the user's.
            except Exception as error:
                failure = _told(error)
    warned = tuple(dict.fromkeys(str(item.message).partition("\n")[0] for item in caught))
    strays = tuple(
        index
        for index, (group, stated) in enumerate(zip(optimizer.param_groups, groups, strict=False))
        if "momentum" in group and "momentum" not in stated
    )
    return Run(made, done, length, rates, momenta, strays, failure, warned)


def _read(
    optimizer: Optimizer, groups: Sequence[Mapping[str, Any]]
) -> list[tuple[float, float | None]]:
    """The learning rate and the momentum of each group, of which a scheduler may make anything.

    Raises:
        _Unusable: the optimizer could not train with what there is.
    """
    now = optimizer.param_groups
    if len(now) != len(groups):
        raise _Unusable(f"it makes {len(now)} param groups of {len(groups)}")
    found = []
    for group, stated in zip(now, groups, strict=True):
        found.append((_number(group.get("lr")), momentum_of(group, stated)))
    return found


def _number(rate: Any) -> float:
    try:
        if not isinstance(rate, str):  # which float() would read
            return float(rate)
    except (TypeError, ValueError, RuntimeError):
        pass
    raise _Unusable(f"it sets lr to {rate!r}, which is no number")


class _Unusable(Exception):
    """A scheduler made something of the groups that is none of theirs."""


def _told(error: Exception) -> str:
    """An error in one line."""
    text = str(error).strip().partition("\n")[0]
    if isinstance(error, _Unusable):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def momentum_of(group: Mapping[str, Any], stated: Mapping[str, Any]) -> float | None:
    """What schedulers cycle against the learning rate; None where a group has neither.

    Args:
        group: its values now, to which schedulers may have added some of other families.
        stated: its hyperparameters.
    """
    if "momentum" in stated:
        return float(group["momentum"])
    return float(group["betas"][0]) if "betas" in stated else None


def curves(
    names: Sequence[str], configured: Sequence[float], values: Sequence[array[float]]
) -> tuple[Curve, ...]:
    """The curves of groups, those together that are alike at every step."""
    found: dict[bytes, list[int]] = {}
    for index, numbers in enumerate(values):
        if numbers:
            found.setdefault(numbers.tobytes(), []).append(index)
    return tuple(
        Curve(
            tuple(names[i] for i in members),
            tuple(configured[i] for i in members),
            tuple(values[members[0]]),
        )
        for members in found.values()
    )


def groups_alone(config: OptimizerConfig) -> list[dict[str, Any]]:
    """The one group that there is without a model."""
    return [config.model_dump(exclude={"name", *WHOLE_FIELDS})]


def values_of_groups(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """The hyperparameters of each group."""
    return [dict(group.values) for group in groups]
