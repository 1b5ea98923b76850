"""Hyperparameters that users and schedules change between steps, checked before they are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from optfactory.config.schema import OptimizerConfig, family_class
from optfactory.config.validation import config_error, validate
from optfactory.errors import UnknownOptimizerError
from optfactory.group_schema import OPTIMIZER_KEY, schema_of
from optfactory.rules.options import (
    NOISE_KEY,
    SEEDS,
    draws_random_numbers,
    noise_after_reset,
)
from optfactory.sharding.processes import is_one_of_many


@dataclass
class Settings:
    """What the param groups said when they were last checked; what they say is read at each step.

    Attributes:
        config: the optimizer's.
        known: each group with its optimizer and its hyperparameters but the learning rate.
    """

    config: OptimizerConfig
    known: list[tuple[dict[str, Any], dict[str, Any]]] = field(default_factory=list)

    def check(
        self,
        groups: Sequence[dict[str, Any]],
        refuse: Callable[[Mapping[int, Mapping[str, Any]]], None],
    ) -> bool:
        """Check what changed since the last call; values become plain ones, as a config's.

        Args:
            refuse: raises if something else cannot follow; gets what groups said before, by id.

        Returns:
            Whether others than learning rates changed, or the groups did.

        Raises:
            ConfigError: a value is missing or refused; the next call checks again.
        """
        title = f"optimizer '{self.config.name}'"
        problems = [
            f"param_groups[{index}].lr: {problem}"
            for index, group in enumerate(groups)
            if (problem := _rate_problem(group))
        ]
        if problems:
            raise config_error(title, problems)
        if len(groups) == len(self.known) and all(map(self._is_as_known, groups, self.known)):
            return False
        checked = [self._checked(group, index) for index, group in enumerate(groups)]
        for group, values in zip(groups, checked, strict=True):
            group.update(values)
        before = {id(group): values for group, values in self.known}
        refuse(before)
        self.known = list(zip(groups, checked, strict=True))
        _follow_seeds(groups, before)
        return True

    def _is_as_known(
        self, group: Mapping[str, Any], known: tuple[Mapping[str, Any], Mapping[str, Any]]
    ) -> bool:
        before = known[1]
        now = {key: group.get(key, _MISSING) for key in before}
        try:
            return group is known[0] and bool(now == before)
        except (RuntimeError, ValueError):  # arrays and tensors of several elements
            return False

    def _checked(self, group: dict[str, Any], index: int) -> dict[str, Any]:
        """The optimizer of a group and its hyperparameters but the learning rate."""
        place, title = f"param_groups[{index}]", f"optimizer '{self.config.name}'"
        name = group.setdefault(OPTIMIZER_KEY, self.config.name)  # wrappers may drop marks
        try:
            schema = family_class(schema_of(group, self.config))
        except UnknownOptimizerError as error:
            raise config_error(title, [f"{place}.{OPTIMIZER_KEY}: {error}"]) from None
        fields = [key for key in schema.model_fields if key not in ("name", "lr")]
        missing = [key for key in ("lr", *fields) if key not in group]
        if missing:
            raise config_error(title, [f"{place}.{key}: is missing; set it" for key in missing])
        # The learning rate is checked at each step.
        values = {**{key: group[key] for key in fields}, "name": name, "lr": 0.0}
        checked = validate(schema, values, place, title).model_dump()
        return {OPTIMIZER_KEY: name, **{key: checked[key] for key in fields}}


class _Missing:
    """Equal to nothing, so that a key that vanished is noticed."""


_MISSING = _Missing()


def _rate_problem(group: dict[str, Any]) -> str:
    """Why a learning rate cannot be used; empty if it can. Text that is a number becomes one."""
    lr = group.get("lr", _MISSING)
    if type(lr) is float and 0 <= lr < math.inf:
        return ""
    expected = "expected a number from 0 on, or a tensor of one,"
    if lr is _MISSING:
        return "is missing; set it"
    if isinstance(lr, Tensor):
        if lr.ndim or lr.is_complex() or lr.dtype == torch.bool or lr.is_meta:
            return f"{expected} got a {lr.dtype} tensor of shape {tuple(lr.shape)} on {lr.device}"
        # Where a graph may be captured, nobody may wait for the value.
        number = 0.0 if group.get("capturable") else float(lr)
    elif isinstance(lr, bool):
        return f"{expected} got {lr!r}"
    else:
        try:
            number = group["lr"] = float(lr)
        except (TypeError, ValueError):
            return f"{expected} got {lr!r}"
    return "" if 0 <= number < math.inf else f"{expected} got {number}"


def _follow_seeds(
    groups: Sequence[dict[str, Any]], before: Mapping[int, Mapping[str, Any]]
) -> None:
    """Give groups that round at random their stream of random numbers.

    It is the group's seed. Without one, parameters get one drawn from torch's generator for all
    groups, and 8-bit codes alone that of the number 0: they need no other noise from run to run.
    """
    drawn = None
    for group in groups:
        if not draws_random_numbers(group):
            continue
        old, seed = before.get(id(group)), group["seed"]
        if seed is not None and (NOISE_KEY not in group or (old and old["seed"] != seed)):
            group[NOISE_KEY] = seed
        elif NOISE_KEY not in group and group["param_rounding"] == "stochastic":
            drawn = drawn_seed() if drawn is None else drawn
            group[NOISE_KEY] = drawn


def drawn_seed() -> int:
    """A seed from torch's generator, which `torch.manual_seed` sets.

    Where there are several processes their generators differ, and copies of a parameter must not:
    there it is 0.
    """
    if is_one_of_many():
        return 0
    return int(torch.randint(0, SEEDS, (), dtype=torch.int64, device="cpu"))


def renew_noise(groups: Sequence[dict[str, Any]]) -> None:
    """Go to the next stream where state was thrown away, because its steps count anew."""
    for group in groups:
        if NOISE_KEY in group:
            group[NOISE_KEY] = noise_after_reset(group[NOISE_KEY])
