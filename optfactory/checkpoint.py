"""Reading a state_dict: everything is checked before anything is changed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from optfactory.errors import StateError
from optfactory.plan import Slot
from optfactory.state import TensorSpec

FORMAT_VERSION = 1

# What decides the meaning of the state: a checkpoint that differs here is refused, not obeyed.
_IDENTITY = ("optimizer", "optim_bits", "amsgrad", "block_size")

# What this run says, whatever run the checkpoint comes from: where state lives, and the labels.
_OWN = ("params", "param_names", "optimizer", "is_paged", "page_dir")

# Keys that a group may have or not.
_OPTIONAL = {"params", "param_names", "name", "initial_lr"}

_LISTED_PROBLEMS = 10


FamilyOf = Callable[[str], str]


def read_groups(
    saved: object, groups: list[dict[str, Any]], family_of: FamilyOf
) -> list[dict[str, Any]]:
    """The hyperparameters to go on with, group by group, without their parameters.

    Raises:
        StateError: the groups do not match this optimizer's.
    """
    if not isinstance(saved, list) or not all(isinstance(group, Mapping) for group in saved):
        raise StateError("the state dict has no list of 'param_groups'")
    sizes = [len(group.get("params", ())) for group in saved]
    expected = [len(group["params"]) for group in groups]
    if sizes != expected:
        raise StateError(
            f"the checkpoint has param groups of {sizes} parameters, this optimizer of {expected}; "
            "build it with the same model and the same groups"
        )
    problems = []
    for index, (old, group) in enumerate(zip(saved, groups, strict=True)):
        problems += [
            f"param_groups[{index}].{problem}" for problem in _group_problems(old, group, family_of)
        ]
    _raise(problems)
    return [
        {key: copy.deepcopy(value) for key, value in old.items() if key not in _OWN}
        for old in saved
    ]


def _group_problems(
    old: Mapping[str, Any], group: dict[str, Any], family_of: FamilyOf
) -> list[str]:
    version = old.get("format_version")
    if version is None:
        return ["format_version: missing; the checkpoint was not written by optfactory"]
    if version > FORMAT_VERSION:
        return [
            f"format_version: {version} is newer than this optfactory reads ({FORMAT_VERSION}); "
            "update optfactory"
        ]
    problems = []
    for key in _IDENTITY:
        theirs, ours = old.get(key), group[key]
        if key == "optimizer" and theirs is not None:
            same = family_of(theirs) == family_of(ours)
        else:
            same = theirs == ours
        if not same:
            problems.append(f"{key}: the checkpoint has {theirs!r}, the config {ours!r}")
    missing = sorted(set(group) - set(old) - _OPTIONAL - set(_IDENTITY))
    problems += [f"{key}: missing in the checkpoint" for key in missing]
    return problems


def read_states(
    saved: object, saved_groups: list[Mapping[str, Any]], slots: list[Slot]
) -> dict[Slot, dict[str, Tensor]]:
    """The checked state tensors of every parameter that the checkpoint has state of.

    Raises:
        StateError: keys, dtypes or shapes differ from what this optimizer keeps; lists them.
    """
    if not isinstance(saved, Mapping):
        raise StateError("the state dict has no mapping 'state'")
    identifiers = [item for group in saved_groups for item in group["params"]]
    strangers = set(saved) - set(identifiers)
    if strangers:
        raise StateError(f"the checkpoint has state of unknown parameters {sorted(strangers)[:10]}")
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
            f"{slot.name}: the checkpoint has {sorted(entries)}, this optimizer {sorted(expected)}"
        )
    for key in expected.keys() & entries.keys():
        problem = _tensor_problem(entries[key], expected[key])
        if problem:
            problems.append(f"{slot.name}.{key}: {problem}")
    return problems


def _tensor_problem(value: object, spec: TensorSpec) -> str:
    if not isinstance(value, Tensor):
        return f"expected a tensor, got {type(value).__name__}"
    if value.dtype != spec.dtype:
        return f"expected {spec.dtype}, got {value.dtype}"
    if tuple(value.shape) != spec.shape:
        return f"expected shape {spec.shape}, got {tuple(value.shape)}"
    return ""


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
