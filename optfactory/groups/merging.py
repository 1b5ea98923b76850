"""What the rules that match a parameter say together, and which of them said what.

The learning rate is multiplied by `lr_scale` and `layer_decay` here, once, so that schedulers which
multiply it keep the ratios.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from optfactory.config.group_rules import RULES_FIELD, GroupRule
from optfactory.group_schema import OPTIMIZER_KEY, begun_anew

# The label of a group that no rule matches.
DEFAULT = "default"

_NO_HYPERPARAMETERS = ("params", "param_names", "name")


@dataclass(frozen=True)
class Hit:
    """A rule that matches a parameter, which is in a layer of so many if the rule has layers.

    Attributes:
        implied: whether the rule is what `others` makes.
    """

    label: str
    rule: GroupRule = field(compare=False)
    layer: int
    last: int
    implied: bool = False

    @property
    def said(self) -> dict[str, Any]:
        """The hyperparameters that the rule states, and its optimizer."""
        named = {} if self.rule.optimizer is None else {OPTIMIZER_KEY: self.rule.optimizer}
        return {**self.rule.overrides, **named}


@dataclass(frozen=True)
class Factor:
    """What a rule multiplies a learning rate by: a number, once for each layer below the last.

    Attributes:
        key: ``lr_scale`` or ``layer_decay``.
        label: of the rule.
        power: how many times; 1 for `lr_scale`.
    """

    key: str
    label: str
    number: float
    power: int

    @property
    def value(self) -> float:
        """The number to this power."""
        return float(self.number**self.power)


@dataclass(frozen=True)
class Making:
    """How the values of one param group came about.

    Attributes:
        own: what the user's param group states.
        hits: the rules that match its parameters, in order; a later one wins.
        base_lr: the learning rate that holds where nothing states another.
        factors: what the rate is multiplied by; of several rules the last one's counts.
    """

    own: Mapping[str, Any]
    hits: tuple[Hit, ...]
    base_lr: float | Tensor
    factors: tuple[Factor, ...]

    @classmethod
    def of(cls, own: Mapping[str, Any], hits: tuple[Hit, ...], base_lr: float | Tensor) -> Making:
        """The making of a group, from what the user's group says and the rules that match."""
        said = {key: value for key, value in own.items() if key not in ("params", "param_names")}
        factors: dict[str, Factor] = {}
        for hit in hits:
            if hit.rule.lr_scale is not None:
                factors["lr_scale"] = Factor("lr_scale", hit.label, hit.rule.lr_scale, 1)
            if hit.rule.layer_decay is not None:
                below = hit.last - hit.layer
                factors["layer_decay"] = Factor(
                    "layer_decay", hit.label, hit.rule.layer_decay, below
                )
        ordered = [factors[key] for key in ("lr_scale", "layer_decay") if key in factors]
        return cls(said, hits, base_lr, tuple(ordered))

    def statements(self) -> Iterator[tuple[Hit | None, dict[str, Any]]]:
        """Who said what, in order: the rules, and None for the user's own group."""
        for hit in self.hits:
            yield hit, hit.said
        yield None, {k: v for k, v in self.own.items() if k not in _NO_HYPERPARAMETERS}

    def sayers(self) -> dict[str, list[Hit | None]]:
        """Who stated each of the hyperparameters that hold, in order: the last one's value does."""
        overrides: dict[str, Any] = {}
        found: dict[str, list[Hit | None]] = {}
        for hit, said in self.statements():
            overrides = told(overrides, said)
            now = {key: [hit] for key in said}
            found = {key: [*found.get(key, []), *now.get(key, [])] for key in overrides}
        return found

    @property
    def rate(self) -> Any:
        """The learning rate before it is multiplied."""
        return self._merged()["lr"]

    def new_group(self) -> dict[str, Any]:
        """A group without parameters yet, with what the rules and then the user's group say."""
        scale = 1.0
        for factor in self.factors:
            scale *= factor.value
        merged = self._merged()
        merged["lr"] = _scaled(merged["lr"], scale)
        hits = self.hits
        labels = [hit.label if not hit.last else f"{hit.label}[{hit.layer}]" for hit in hits]
        named = "name" in self.own
        labels = [str(self.own["name"]), *labels] if named else labels or [DEFAULT]
        return {**merged, "name": "+".join(labels), "params": []}

    def _merged(self) -> dict[str, Any]:
        overrides: dict[str, Any] = {}
        for _, said in self.statements():
            overrides = told(overrides, said)
        return {"lr": self.base_lr, **overrides}


def told(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """What holds for a parameter after one more rule, or its own group, was read.

    Where that states an optimizer, it begins anew: keys of another family would mean nothing.
    """
    return {**(begun_anew(before) if OPTIMIZER_KEY in now else before), **now}


def without_others(hits: tuple[Hit, ...], own: Mapping[str, Any]) -> tuple[Hit, ...]:
    """The rules but for `others`, whose rate and decay are for its optimizer, if another is named.

    Args:
        own: what the user's group says.
    """
    named = OPTIMIZER_KEY in own or any(h.rule.optimizer for h in hits if not h.implied)
    return tuple(hit for hit in hits if not (named and hit.implied))


def conflict(hits: tuple[Hit, ...], place: str) -> str:
    """Why the rules that match one parameter cannot be merged; empty if they can."""
    scaling = [hit.label for hit in hits if hit.rule.lr_scale is not None]
    stating = [hit.label for hit in hits if "lr" in hit.rule.overrides and not hit.implied]
    if not (scaling and stating):
        return ""
    return (
        f"{RULES_FIELD}.{stating[-1]}.lr: meets lr_scale of the rule '{scaling[-1]}' at {place}; "
        "keep one of them"
    )


def _scaled(lr: Any, scale: float) -> Any:
    """A learning rate times a factor; what is no number stays for the schema to refuse.

    A tensor is copied: schedulers change each group's in place.
    """
    if isinstance(lr, bool) or (isinstance(lr, Tensor) and lr.dtype == torch.bool):
        return lr
    if isinstance(lr, Tensor):
        return lr.clone() if scale == 1.0 else lr * scale
    try:
        return float(lr) * scale
    except (TypeError, ValueError):
        return lr
