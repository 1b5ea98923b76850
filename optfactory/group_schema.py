"""Which optimizer a param group has: the config's, or another that a rule or the group names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optfactory.config.group_rules import OTHERS_FIELD, WHOLE_FIELDS, GroupRule
from optfactory.config.names import OptimizerName, width_of
from optfactory.config.schema import OptimizerConfig, family_class
from optfactory.config.validation import model_or_errors, problem_text
from optfactory.registry import get_optimizer_info, implied_fields
from optfactory.rules.options import draws_random_numbers

# The key of rules and of param groups.
OPTIMIZER_KEY = "optimizer"

# What a group with another optimizer still takes from the config: how far it goes, what is
# optimized, and what others read. All else are the other name's defaults.
SHARED_FIELDS = ("lr", "weight_decay", "maximize", "annotations")


# How 16-bit parameters are stored.
_STORING = ("param_rounding", "master_weights")


def schema_of(group: Mapping[str, Any], config: OptimizerConfig) -> type[OptimizerConfig]:
    """The schema of a param group of an optimizer: its rule, and its scalars.

    Args:
        config: the optimizer's.

    Raises:
        UnknownOptimizerError: the group names an optimizer that does not exist.
    """
    name = group.get(OPTIMIZER_KEY, config.name)
    return type(config) if name == config.name else get_optimizer_info(name).base


def base_values(
    name: object, config: OptimizerConfig
) -> tuple[type[OptimizerConfig], dict[str, Any]]:
    """A family's schema, and the values of a param group that states no hyperparameter.

    Args:
        name: of the optimizer that a rule or the group states; None if none does.
        config: the optimizer's.

    Raises:
        UnknownOptimizerError: nothing of that name.
    """
    own = config.model_dump(exclude=set(WHOLE_FIELDS))
    if name is None:
        return family_class(type(config)), own
    return get_optimizer_info(str(name)).base, values_of_other(str(name), own)


def values_of_other(name: str, own: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a group with another optimizer, before it states some itself.

    Args:
        name: as it was written.
        own: values of the optimizer's config.
    """
    info = get_optimizer_info(name)
    implied = implied_fields(name, info.name)
    return {**info.defaults, **begun_anew(own), **implied, "name": info.name}


def others_name(values: Mapping[str, Any]) -> str:
    """The optimizer of what is no hidden matrix, where `others` does not name it: AdamW, as wide.

    >>> others_name({"optim_bits": 8, "is_paged": True})
    'paged_adamw8bit'

    Args:
        values: of the optimizer for matrices.
    """
    width = width_of(values)
    paged = values.get("is_paged") is True
    return str(OptimizerName("adamw", "" if width == "32bit" else width, paged))


def others_rule(config: OptimizerConfig) -> dict[str, GroupRule]:
    """The rule for what is no hidden matrix, by its label; none where all can be trained alike."""
    given = getattr(config, OTHERS_FIELD, None)
    if given is None:
        return {}
    values = config.model_dump()
    own = {key: value for key, value in given.items() if key != "name"}
    name = given.get("name", others_name(values))
    said = _of_all_parameters(values, {**values_of_other(name, values), **own})
    if not own.keys().isdisjoint(_STORING):  # one of them may contradict another that is inherited
        said = {key: value for key, value in said.items() if key not in _STORING}
    own = {**said, **own}
    return {OTHERS_FIELD: GroupRule(hidden=False, optional=True, optimizer=name, **own)}


def _of_all_parameters(values: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """What a config says of parameters and steps, whatever optimizer trains them.

    Args:
        values: of the config.
        theirs: what the others have without it.
    """
    said = {key: values[key] for key in (*_STORING, "capturable")}
    if values["nonfinite"] == "skip_step":  # or half of a step would be taken
        said["nonfinite"] = "skip_step"
    if values["is_paged"] and theirs["is_paged"]:
        said |= {key: values[key] for key in ("page_dir", "page_memory")}
    if draws_random_numbers({**theirs, **said}):
        said["seed"] = values["seed"]
    return {key: value for key, value in said.items() if value != theirs[key]}


def begun_anew(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """What is left of what a parameter was told where something states another optimizer."""
    return {key: overrides[key] for key in SHARED_FIELDS if key in overrides}


def family_of(name: object) -> str:
    """The plain name of an optimizer's family, for groups that state all else.

    Raises:
        UnknownOptimizerError: nothing of that name.
    """
    return get_optimizer_info(str(name)).family


def contradictions(group: Mapping[str, Any], place: str) -> list[str]:
    """What a param group of the user's states against the name of the optimizer in it.

    Rules that match the same parameters may override what a name states; one statement may not.

    Args:
        place: where the group stands, for messages.

    Raises:
        UnknownOptimizerError: nothing of that name.
    """
    if OPTIMIZER_KEY not in group:
        return []
    info = get_optimizer_info(str(group[OPTIMIZER_KEY]))
    model = info.config_class
    stated = {key: group[key] for key in model.locked.keys() - {"name"} if key in group}
    _, errors = model_or_errors(model, {**info.defaults, "name": info.name, **stated})
    return [problem_text(model, place, item) for item in errors]
