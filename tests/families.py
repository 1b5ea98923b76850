"""What tests ask of the registry: families, by the fields they have, and the states of a rule.

A test of all families takes them from here, so that one that is added takes part by itself. What
only some families have (amsgrad, a second moment) is asked for by its field or its state. What is
asked of single elements, or of vectors, is not for families that make directions of whole matrices:
such tests walk `ELEMENT_WISE`, or take the shapes that are `suited`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from itertools import product
from typing import Any, Literal, get_args, get_origin

from optfactory import get_optimizer_info, list_optimizers, resolve
from optfactory.config.names import names_of_family
from optfactory.config.schema import OptimizerConfig
from optfactory.errors import ConfigError
from optfactory.rules.language import StateSpec, UpdateRule

NAMES = list_optimizers()
FAMILIES = sorted({get_optimizer_info(name).family for name in NAMES})
PER_FAMILY = len(names_of_family("any"))  # names, where no width is too coarse
# The families whose numbers and names some tests write out, so that none of them is lost.
FIRST = ("adam", "adamw", "lamb")
NAMES_OF_FIRST = [name for name in NAMES if get_optimizer_info(name).family in FIRST]


def is_of_matrices(name: str) -> bool:
    """Whether an optimizer makes directions of whole matrices, and leaves all else to others."""
    return get_optimizer_info(name).base.of_matrices


ELEMENT_WISE = [family for family in FAMILIES if not is_of_matrices(family)]
ELEMENT_WISE_NAMES = [name for name in NAMES if not is_of_matrices(name)]
# Options that decide about single elements, and the only value of another that matrices refuse.
_OF_ELEMENTS = {"skip_zeros", "cautious", "compat"}
_SKIPS_ELEMENTS = ("nonfinite", "skip_element")

Shape = tuple[int, ...]


def suited(name: str, shapes: Iterable[Shape]) -> list[Shape]:
    """Those of these shapes that an optimizer trains by its own rule."""
    return [shape for shape in shapes if len(shape) == 2 or not is_of_matrices(name)]


def names_with(*fields: str) -> list[str]:
    """The names whose schema has all of these fields."""
    return [name for name in NAMES if set(fields) <= set(get_optimizer_info(name).defaults)]


def families_with(*fields: str) -> list[str]:
    """The families whose schema has all of these fields."""
    return [family for family in FAMILIES if family in names_with(*fields)]


# Fields for one kind of state, by whether it can be negative: without such state they are refused.
OF_SIGNED_STATE = {"signed_map": True, "second_moment_floor": False}
# Settings beside which families have what such fields leave out a part of; the first that fits.
CAUTIOUS: dict[str, list[dict[str, Any]]] = {
    "cautious": [{}, {"momentum": 0.5}, {"trust_ratio": "clip"}],
    "cautious_weight_decay": [
        {"weight_decay": 0.1} | asked
        for asked in (
            {},
            {"adam_w_mode": True},
            {"decoupled_weight_decay": True},
            {"trust_ratio": "clip"},
        )
    ],
}


def beside(name: str, field: str) -> dict[str, Any] | None:
    """What else is set where a field acts that is refused elsewhere; None if it acts nowhere."""
    for asked in CAUTIOUS.get(field, [{}]):
        with suppress(ConfigError):
            resolve(name, **asked, **({field: True} if field in CAUTIOUS else {}))
            return asked
    return None


def acts_on(name: str, field: str) -> bool:
    """Whether an optimizer has a field, and the state that the field is for."""
    if not has(name, field) or (is_of_matrices(name) and field in _OF_ELEMENTS):
        return False
    if beside(name, field) is None:
        return False
    signs = {state.signed for state in states_of(name)}
    return OF_SIGNED_STATE.get(field) in {None, *signs}


def known_to(name: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked for, without the fields that an optimizer does not have or has no use for.

    Two betas are not for one that has three.
    """
    return {key: value for key, value in asked.items() if takes(name, key, value)}


def takes(name: str, field: str, value: Any) -> bool:
    """Whether an optimizer has a field and a use for it, and as many betas as there are."""
    if not acts_on(name, field) or (is_of_matrices(name) and (field, value) == _SKIPS_ELEMENTS):
        return False
    return field != "betas" or len(value) == len(get_optimizer_info(name).defaults["betas"])


def has(name: str, field: str) -> bool:
    """Whether an optimizer's schema has a field."""
    return field in get_optimizer_info(name).config_class.model_fields


def states_of(config: str | OptimizerConfig, **asked: Any) -> tuple[StateSpec, ...]:
    """The states that an optimizer keeps with these options."""
    return rule_of(config, **asked).states


def rule_of(config: str | OptimizerConfig, **asked: Any) -> UpdateRule:
    """The update rule that an optimizer has with these options."""
    resolved = resolve(config, **asked)
    return resolved.rule(resolved.model_dump())


def few_values(name: str, field: str) -> tuple[Any, ...]:
    """The values of a field with a handful of them; of a number: none, and some."""
    annotation = get_optimizer_info(name).config_class.model_fields[field].annotation
    if annotation in (bool, float):
        return (False, True) if annotation is bool else (0.0, 0.5)
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def selections(name: str) -> list[dict[str, Any]]:
    """All that fields may say by which a rule is chosen, as amsgrad is; not what is refused."""
    fields = get_optimizer_info(name).config_class.model_fields
    deciding = [
        field
        for field in fields
        if len({rule_of(name, **asked) for asked in _allowed(name, (field,))}) > 1
    ]
    return _allowed(name, deciding)


def _allowed(name: str, fields: Iterable[str]) -> list[dict[str, Any]]:
    """The combinations of a few values of these fields that are no error."""
    found = []
    for values in product(*(few_values(name, field) for field in fields)):
        asked = dict(zip(fields, values, strict=True))
        with suppress(ConfigError):
            resolve(name, **asked)
            found.append(asked)
    return found


def has_adams_moments(name: str) -> bool:
    """Whether an optimizer keeps means of the gradient and of its square."""
    return [state.name for state in states_of(name)] == ["exp_avg", "exp_avg_sq"]


def has_ratio(name: str) -> bool:
    """Whether an optimizer scales the steps of a tensor by a trust ratio."""
    return rule_of(name).trust_ratio is not None


assert set(FIRST) <= set(FAMILIES)
