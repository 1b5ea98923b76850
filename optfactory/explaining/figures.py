"""What an explanation consists of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from optfactory.config.schema import OptimizerConfig
from optfactory.groups.merging import Factor

# Where a value may come from; CONFIG is what Python was given.
NAME, FILE, CONFIG, OVERRIDE = "name", "file", "config", "override"
SPELLING, DEFAULT = "spelling", "default"


@dataclass(frozen=True)
class Key:
    """One key of the config.

    Attributes:
        key: the field; of a rule for param groups ``param_groups.LABEL``.
        value: as JSON has it.
        source: ``name`` (the name states it), ``file``, ``config`` (what Python was given),
            ``override``, ``spelling`` (what an alias implies) or ``default``.
        description: of the field.
        given: how it was written, where the value differs from that; else empty.
        default: the family's default where the value is another; else None.
    """

    key: str
    value: Any
    source: str
    description: str
    given: str = ""
    default: Any = None


@dataclass(frozen=True)
class Setting:
    """A hyperparameter that was stated for a group, or is not as everywhere.

    Attributes:
        said_by: the label of the rule whose value holds, `OWN` for the param group itself, or empty
            where it follows from another one.
        was: what it is where nothing states another.
        overruled: what earlier rules said, by their labels.
    """

    key: str
    value: Any
    said_by: str
    was: Any
    overruled: Mapping[str, Any]


OWN = "the param group itself"


@dataclass(frozen=True)
class Rate:
    """The learning rate of a group, and how it came about.

    Attributes:
        value: what the optimizer has.
        base: before it is multiplied.
        said_by: who stated `base`: as for `Setting`, empty for the config.
        factors: what it is multiplied by.
    """

    value: float
    base: float
    said_by: str
    factors: tuple[Factor, ...]


@dataclass(frozen=True)
class States:
    """Tensors of a group whose state is stored alike.

    Attributes:
        codecs: how each state is stored, by its name.
        place: where: ``resident``, ``file-mapped``, ``managed`` or ``pinned``.
        reason: why not as the config says; else empty.
        tensors: how many.
        nbytes: bytes of all their state.
        names: of the tensors.
    """

    codecs: Mapping[str, str]
    place: str
    reason: str
    tensors: int
    nbytes: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class Group:
    """One param group, as the optimizer will have it.

    Attributes:
        name: the labels of the rules that match, or its number.
        rules: the labels alone, in order; the last one that states a key wins.
        optimizer: the name of its optimizer.
        is_other: whether that is not the config's.
        reasons: why tensors are no hidden matrices, where `others` trains them.
        parameters: the names of its trained tensors.
        elements: how many elements they have together.
        rate: its learning rate.
        settings: the other hyperparameters that were stated for it.
        defaults: what another optimizer has of its own, and nothing states.
        states: what state there is.
        values: all hyperparameters, as the optimizer's param group has them.
    """

    name: str
    rules: tuple[str, ...]
    optimizer: str
    is_other: bool
    reasons: tuple[str, ...]
    parameters: tuple[str, ...]
    elements: int
    rate: Rate
    settings: tuple[Setting, ...]
    defaults: Mapping[str, Any]
    states: tuple[States, ...]
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Curve:
    """What one or several groups have alike over the steps.

    Attributes:
        groups: their names.
        configured: the value that the config says, of each of them.
        values: at each step.
    """

    groups: tuple[str, ...]
    configured: tuple[float, ...]
    values: tuple[float, ...]

    @property
    def varies(self) -> bool:
        """Whether the scheduler changes anything."""
        return {*self.configured, *self.values} != {self.values[0]}

    def extremes(self) -> tuple[int, int]:
        """The steps of its least and of its greatest value; of finite ones, if there are any."""
        values = self.values
        steps = [step for step, value in enumerate(values) if math.isfinite(value)] or [0]
        return min(steps, key=values.__getitem__), max(steps, key=values.__getitem__)


@dataclass(frozen=True)
class Schedule:
    """What a scheduler does to the groups.

    Attributes:
        name: of its class or function.
        arguments: as they were given.
        steps: how many were run: an optimizer's step, then one of the scheduler. 0 if it depends
            on metrics and cannot be run alone.
        length: how many steps its arguments are made for; None where they do not say.
        rates: learning rates; groups that are alike share a curve.
        momenta: the momentum, or the first of the betas, where it is changed.
        milestones: the steps that tell most of the curves, and what happens there.
        keeps_ratios: whether the rates of groups keep the ratios that the config gives them.
        failure: what it raised; else empty.
        told: sentences about it.
    """

    name: str
    arguments: Mapping[str, Any]
    steps: int
    length: int | None
    rates: tuple[Curve, ...]
    momenta: tuple[Curve, ...]
    milestones: Mapping[int, str]
    keeps_ratios: bool
    failure: str
    told: tuple[str, ...]


@dataclass(frozen=True)
class Figures:
    """A config as the optimizer understands it.

    Attributes:
        config: the optimizer's.
        source: what the config was read from.
        keys: every key of the config.
        groups: the param groups; None without a model.
        schedule: what the scheduler does; None without one.
        warnings: what was perhaps not meant.
        problems: why training would fail: rules that match nothing, a scheduler that raises.
        notes: what was left out.
    """

    config: OptimizerConfig
    source: str
    keys: tuple[Key, ...]
    groups: tuple[Group, ...] | None
    schedule: Schedule | None
    warnings: tuple[str, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The explanation as JSON has it; of curves what milestones tell, and their extremes."""
        told = {
            "config": self.config.model_dump(mode="json"),
            "source": self.source,
            "keys": [asdict(key) for key in self.keys],
            "groups": None if self.groups is None else [_group(group) for group in self.groups],
            "scheduler": None if self.schedule is None else _schedule(self.schedule),
            "warnings": list(self.warnings),
            "problems": list(self.problems),
            "notes": list(self.notes),
        }
        return {key: plain_json(value) for key, value in told.items()}


def _group(group: Group) -> dict[str, Any]:
    factors = [{**asdict(factor), "value": factor.value} for factor in group.rate.factors]
    return {**asdict(group), "rate": {**asdict(group.rate), "factors": factors}}


def _schedule(schedule: Schedule) -> dict[str, Any]:
    told = asdict(schedule)
    for kind in ("rates", "momenta"):
        told[kind] = [_curve(curve, schedule.milestones) for curve in getattr(schedule, kind)]
    return {**told, "milestones": {str(step): text for step, text in schedule.milestones.items()}}


def _curve(curve: Curve, milestones: Mapping[int, str]) -> dict[str, Any]:
    lowest, highest = curve.extremes()
    return {
        "groups": list(curve.groups),
        "configured": list(curve.configured),
        "at": {str(step): curve.values[step] for step in milestones},
        "min": {"value": curve.values[lowest], "step": lowest},
        "max": {"value": curve.values[highest], "step": highest},
    }


def plain_json(value: Any) -> Any:
    """A value in the types of JSON; what has none, as infinite numbers, as text."""
    if isinstance(value, Mapping):
        return {str(key): plain_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain_json(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(float(value))
    return value if isinstance(value, (str, int, type(None))) else repr(value)
