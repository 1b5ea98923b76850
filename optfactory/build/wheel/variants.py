"""Which kernels a wheel carries: what all names run with their default options.

That is every combination of dtypes, and every rule that a name's own fields select (AMSGrad, the
kinds of trust ratio, a momentum or none). Options around the rule multiply the kernels, and are
compiled when used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from itertools import product
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError

from optfactory import optimizers
from optfactory.config.schema import OptimizerConfig, family_class
from optfactory.registry import get_optimizer_info, list_optimizers
from optfactory.rules.codegen import KernelVariant
from optfactory.rules.formats import block_size_of, format_of
from optfactory.rules.language import UpdateRule
from optfactory.rules.options import KernelOptions
from optfactory.rules.parts import RulePart, parts_of

# Of a parameter and its gradient, as kernels call them; `optfactory.step.plan` accepts no others.
DTYPES = (
    ("float", "float"),
    ("bfloat16", "bfloat16"),
    ("bfloat16", "float"),
    ("float16", "float16"),
    ("float16", "float"),
)

Group = Mapping[str, Any]


@cache
def prebuilt_variants() -> list[KernelVariant]:
    """Every kernel of a wheel, once each."""
    groups = [
        group
        for name in list_optimizers()
        if is_built_in(config_class := get_optimizer_info(name).config_class)
        for group in _groups(config_class, name)
    ]
    found = {
        _variant({**group, **part.settings}, part, *dtypes): None
        for group in groups
        for part in parts_of(_kernel_of(group)[0])
        for dtypes in DTYPES
    }
    return list(found)


def _variant(group: Group, part: RulePart, parameter: str, gradient: str) -> KernelVariant:
    dtypes = part.dtypes(parameter, gradient)
    formats = tuple(format_of(group, state) for state in part.rule.states)
    options = KernelOptions.of(group, formats, rounds=dtypes[0] != "float")
    return KernelVariant(part.rule, *dtypes, formats, block_size_of(part.rule, group), options)


def is_built_in(config_class: type[OptimizerConfig]) -> bool:
    """Whether its family is of this package; others may be installed where a wheel is built."""
    return family_class(config_class).__module__.startswith(f"{optimizers.__name__}.")


def _kernel_of(group: Group) -> tuple[UpdateRule, int]:
    config_class = get_optimizer_info(group["name"]).config_class
    return config_class.rule(group), group["optim_bits"]


def _groups(config_class: type[OptimizerConfig], name: str) -> Iterator[Group]:
    """The name's defaults, and all combinations of the switches that select another rule."""
    defaults = config_class(name=name).model_dump()
    switches = [
        (field, value)
        for field in config_class.model_fields
        for value in choices(config_class, field)
        if (group := group_of(config_class, name, {field: value}))
        and _kernel_of(group) != _kernel_of(defaults)
    ]
    for chosen in product((False, True), repeat=len(switches)):
        overrides = dict(switch for switch, on in zip(switches, chosen, strict=True) if on)
        group = group_of(config_class, name, overrides)
        if group:
            yield group


def choices(config_class: type[OptimizerConfig], field: str) -> tuple[Any, ...]:
    """The values of a field that has a handful of them; of a number: none, and some."""
    annotation = config_class.model_fields[field].annotation
    if annotation is float:
        return (0.0, 0.5)
    if annotation is bool:
        return (False, True)
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def group_of(config_class: type[OptimizerConfig], name: str, overrides: Group) -> Group | None:
    """Hyperparameters by name; None if they are refused together."""
    try:
        return config_class(name=name, **overrides).model_dump()
    except ValidationError:
        return None
