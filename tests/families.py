"""What tests ask of the registry: families, by the fields they have, and the states of a rule.

A test of all families takes them from here, so that one that is added takes part by itself. What
only some families have (amsgrad, a second moment) is asked for by its field or its state.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optfactory import get_optimizer_info, list_optimizers, resolve
from optfactory.config.schema import OptimizerConfig
from optfactory.rules.language import StateSpec

NAMES = list_optimizers()
FAMILIES = sorted({get_optimizer_info(name).family for name in NAMES})
# The families whose numbers and names some tests write out, so that none of them is lost.
FIRST = ("adam", "adamw", "lamb")
NAMES_OF_FIRST = [name for name in NAMES if get_optimizer_info(name).family in FIRST]


def names_with(*fields: str) -> list[str]:
    """The names whose schema has all of these fields."""
    return [name for name in NAMES if set(fields) <= set(get_optimizer_info(name).defaults)]


def families_with(*fields: str) -> list[str]:
    """The families whose schema has all of these fields."""
    return [family for family in FAMILIES if family in names_with(*fields)]


# Fields for one kind of state, by whether it can be negative: without such state they are refused.
OF_SIGNED_STATE = {"signed_map": True, "second_moment_floor": False}


def acts_on(name: str, field: str) -> bool:
    """Whether an optimizer has a field, and the state that the field is for."""
    if not has(name, field):
        return False
    signs = {state.signed for state in states_of(name)}
    return OF_SIGNED_STATE.get(field) in {None, *signs}


def known_to(name: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked for, without the fields that an optimizer does not have or has no use for."""
    return {key: value for key, value in asked.items() if acts_on(name, key)}


def has(name: str, field: str) -> bool:
    """Whether an optimizer's schema has a field."""
    return field in get_optimizer_info(name).config_class.model_fields


def states_of(config: str | OptimizerConfig, **asked: Any) -> tuple[StateSpec, ...]:
    """The states that an optimizer keeps with these options."""
    resolved = resolve(config, **asked)
    return resolved.rule(resolved.model_dump()).states


def has_adams_moments(name: str) -> bool:
    """Whether an optimizer keeps means of the gradient and of its square."""
    return [state.name for state in states_of(name)] == ["exp_avg", "exp_avg_sq"]


def has_ratio(name: str) -> bool:
    """Whether an optimizer scales the steps of a tensor by a trust ratio."""
    resolved = resolve(name)
    return resolved.rule(resolved.model_dump()).trust_ratio is not None


assert set(FIRST) <= set(FAMILIES)
