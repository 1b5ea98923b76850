"""Reading a state_dict: everything is checked before anything is changed."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from optfactory.errors import ConfigError, StateError, UnknownOptimizerError
from optfactory.plan import Slot
from optfactory.registry import family_class, get_optimizer_info
from optfactory.schema import OptimizerConfig, validate

FORMAT_VERSION = 1

# What decides, beside the family, what the state means: a checkpoint that differs in one of these
# is refused, not obeyed.
_IDENTITY = ("optim_bits", "amsgrad", "block_size")

# What this run says, whatever run the checkpoint comes from: where state lives, and the labels.
_PLACEMENT = ("is_paged", "page_dir", "page_memory", "capturable")
_OWN = ("params", "param_names", "optimizer", *_PLACEMENT)

# Keys that a group may have or not.
_OPTIONAL = {"params", "param_names", "name", "initial_lr", *_PLACEMENT}

_LISTED_PROBLEMS = 10

Groups = list[Mapping[str, Any]]


def parts(state_dict: object) -> tuple[Groups, Mapping[Any, Any]]:
    """The param groups and the states of a state dict.

    Raises:
        StateError: it is no state dict of an optimizer.
    """
    if not isinstance(state_dict, Mapping):
        raise StateError(f"a state dict is a mapping, got {type(state_dict).__name__}")
    groups, state = state_dict.get("param_groups"), state_dict.get("state")
    if not isinstance(groups, list):
        raise StateError("the state dict has no list 'param_groups'")
    for index, group in enumerate(groups):
        if not isinstance(group, Mapping) or not isinstance(group.get("params", []), list):
            raise StateError(f"param_groups[{index}] is no mapping with a list of 'params'")
    if not isinstance(state, Mapping):
        raise StateError("the state dict has no mapping 'state'")
    return groups, state


def read_groups(
    saved: Groups, groups: list[dict[str, Any]], config: OptimizerConfig
) -> list[dict[str, Any]]:
    """The hyperparameters to go on with, group by group, without their parameters.

    Raises:
        StateError: the groups do not match this optimizer's, or hold values that its schema
            refuses.
    """
    sizes = [len(group.get("params", ())) for group in saved]
    expected = [len(group["params"]) for group in groups]
    if sizes != expected:
        raise StateError(
            f"the checkpoint has param groups of {sizes} parameters, this optimizer of {expected}; "
            "build it with the same model and the same groups"
        )
    problems = []
    read = []
    for index, (old, group) in enumerate(zip(saved, groups, strict=True)):
        found = _identity_problems(old, group, config)
        try:
            read.append(_values(old, group, config) if not found else {})
        except ConfigError as error:
            found = list(error.problems)
        problems += [f"param_groups[{index}].{problem}" for problem in found]
    _raise(problems)
    return read


def _identity_problems(
    old: Mapping[str, Any], group: Mapping[str, Any], config: OptimizerConfig
) -> list[str]:
    version = old.get("format_version")
    if not isinstance(version, int):
        got = "missing" if version is None else f"no number ({version!r})"
        return [f"format_version: {got}; the checkpoint was not written by optfactory"]
    if version > FORMAT_VERSION:
        return [
            f"format_version: {version} is newer than this optfactory reads ({FORMAT_VERSION}); "
            "update optfactory"
        ]
    missing = sorted(set(group) - set(old) - _OPTIONAL)
    if missing:
        return [f"{key}: missing in the checkpoint" for key in missing]
    theirs, ours = old.get("param_names"), group.get("param_names", [])
    if isinstance(theirs, list) and theirs != ours and sorted(map(str, theirs)) == sorted(ours):
        return ["param_names: the checkpoint has the same parameters in another order"]
    problems = [
        f"{key}: the checkpoint has {old[key]!r}, the config {group[key]!r}"
        for key in _IDENTITY
        if key in group and old[key] != group[key]
    ]
    if _family(old["optimizer"]) != config.family:
        problems.append(
            f"optimizer: the checkpoint has {old['optimizer']!r}, the config {group['optimizer']!r}"
        )
    return problems


def _family(name: object) -> str:
    try:
        return get_optimizer_info(str(name)).family
    except UnknownOptimizerError:
        return ""


def _values(
    old: Mapping[str, Any], group: Mapping[str, Any], config: OptimizerConfig
) -> dict[str, Any]:
    """What a group takes over from the checkpoint; its hyperparameters pass the schema.

    Raises:
        ConfigError: the schema refuses them.
    """
    model = family_class(type(config))
    fields = [key for key in model.model_fields if key in group]
    values = {key: group[key] if key in _OWN else old[key] for key in fields}
    checked = validate(model, {**values, "name": config.name}, "", "the checkpoint").model_dump()
    taken = copy.deepcopy({key: value for key, value in old.items() if key not in _OWN})
    # A tensor lr stays a tensor: schedules change it in place.
    return taken | {
        key: checked[key] for key in fields if key in taken and not isinstance(taken[key], Tensor)
    }


def read_states(
    saved: Mapping[Any, Any], saved_groups: Groups, slots: list[Slot]
) -> dict[Slot, dict[str, Tensor]]:
    """The checked state tensors of every parameter that the checkpoint has state of.

    Raises:
        StateError: keys, dtypes or shapes differ from what this optimizer keeps; lists them.
    """
    identifiers = [item for group in saved_groups for item in group["params"]]
    if not all(isinstance(item, (int, str)) for item in identifiers):
        raise StateError("the checkpoint's param groups must list parameters by number or name")
    strangers = [key for key in saved if key not in identifiers]
    if strangers:
        raise StateError(f"the checkpoint has state of unknown parameters {strangers[:10]}")
    found: dict[Slot, dict[str, Tensor]] = {}
    problems: list[str] = []
    for identifier, slot in zip(identifiers, slots, strict=True):
        if identifier in saved:
            entries = saved[identifier]
            if not isinstance(entries, Mapping):
                problems.append(f"{slot.name}: expected a mapping, got {type(entries).__name__}")
                continue
            problems += _state_problems(slot, entries)
            found[slot] = dict(entries)
    _raise(problems)
    return found


def _state_problems(slot: Slot, entries: Mapping[str, Any]) -> list[str]:
    expected = slot.layout.tensors
    problems = []
    if set(entries) != set(expected):
        problems.append(
            f"{slot.name}: the checkpoint has {list(entries)}, this optimizer {list(expected)}"
        )
    for key in expected.keys() & entries.keys():
        problem = expected[key].problem(entries[key])
        if not problem and key == "step":
            problem = _step_problem(float(entries[key]))
        if problem:
            problems.append(f"{slot.name}.{key}: {problem}")
    return problems


def _step_problem(step: float) -> str:
    return "" if step >= 0 and step.is_integer() else f"expected a count, got {step}"


def _raise(problems: list[str]) -> None:
    if not problems:
        return
    listed = "".join(f"\n  {problem}" for problem in problems[:_LISTED_PROBLEMS])
    more = len(problems) - _LISTED_PROBLEMS
    listed += f"\n  ... and {more} more" if more > 0 else ""
    raise StateError(
        f"the checkpoint does not fit this optimizer, {len(problems)} problem(s); "
        f"nothing was loaded:{listed}"
    )


def copy_states(slot: Slot, entries: Mapping[str, Tensor]) -> None:
    """Copy checked tensors into a parameter's live state, which stays where it is."""
    with torch.no_grad():
        for key, value in entries.items():
            slot.state[key].copy_(value)
