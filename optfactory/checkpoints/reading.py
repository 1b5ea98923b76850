"""Reading a state_dict: everything is checked before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from optfactory.checkpoints.fields import Fields
from optfactory.checkpoints.foreign import States, copied
from optfactory.checkpoints.layouts import Groups
from optfactory.checkpoints.names import name_problems
from optfactory.checkpoints.records import (
    AROUND,
    MARKS,
    MATRICES,
    PLACEMENT,
    PRODUCTS,
    STORAGE,
    GroupRecord,
    Layout,
    Record,
)
from optfactory.checkpoints.sharded import local_entries, read_local, whole_entries
from optfactory.config.schema import OptimizerConfig, family_class
from optfactory.config.validation import validate
from optfactory.errors import ConfigError, StateError
from optfactory.group_schema import OPTIMIZER_KEY, schema_of
from optfactory.registry import get_optimizer_info
from optfactory.rules.options import NOISE_KEY, SEEDS, draws_random_numbers
from optfactory.step.slots import Slot

# What this optimizer keeps of its own, whatever the checkpoint says.
_OWN = (*MARKS, *PLACEMENT, *STORAGE, *AROUND, *PRODUCTS, *MATRICES, NOISE_KEY)

# What every library saves. Other hyperparameters a checkpoint may lack, for example one of an
# older release: they stay as the config has them.
_ALWAYS_SAVED = ("lr", "betas", "eps", "weight_decay")

_LISTED_PROBLEMS = 10


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
    saved: Groups, groups: list[dict[str, Any]], config: OptimizerConfig, layout: Layout
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
            f"build it with the same model and the same groups{_hint(sizes, groups)}"
        )
    problems = []
    read = []
    moved = name_problems(saved, groups)
    for index, (old, group) in enumerate(zip(saved, groups, strict=True)):
        record, ours = layout.read_group(old), family_class(schema_of(group, config))
        name = str(group[OPTIMIZER_KEY])
        found = record.problems or _strange(record, ours, name) or _group_problems(record, group)
        found = found or moved[index]
        try:
            read.append(_values(record, group, ours, name) if not found else {})
        except ConfigError as error:
            found = list(error.problems)
        problems += [f"param_groups[{index}].{problem}" for problem in found]
    _raise(problems)
    return read


def _hint(sizes: list[int], groups: list[dict[str, Any]]) -> str:
    """What makes the checkpoint's groups, if they are those of most Trainers; else empty.

    Rules make groups in the order of the first parameter of each.
    """
    flat = [p.ndim <= 1 for group in groups for p in group["params"]]
    if len(groups) != 1 or flat[:1] != [False] or sizes != [flat.count(False), flat.count(True)]:
        return ""
    return (
        ": a checkpoint of Hugging Face's Trainer has two, with and without weight decay, and "
        "param_groups='no_decay_1d' makes groups of these sizes"
    )


def _strange(record: GroupRecord, ours: type[OptimizerConfig], name: str) -> list[str]:
    """Why state of the checkpoint's family is of no use to a group's, whatever the settings.

    A family whose schema inherits another's differs from it in defaults and in how weight decay
    enters: AdamW from Adam.
    """
    possible = (record.family,) if record.family else record.families
    for family in possible:
        theirs = get_optimizer_info(family).base
        if issubclass(theirs, ours) or issubclass(ours, theirs):
            return []
    families = " or ".join(map(repr, possible))
    return [
        f"optimizer: the checkpoint is of family {families}, the config's name is "
        f"'{name}'; take a name of that family, or start with fresh state"
    ] * bool(possible)


def _group_problems(record: GroupRecord, group: Mapping[str, Any]) -> list[str]:
    old = record.values
    missing = [key for key in _ALWAYS_SAVED if key in group and key not in old]
    if missing:
        return [f"{key}: missing in the checkpoint" for key in missing]
    amsgrad = group.get("amsgrad")
    if old.get("amsgrad", amsgrad) is not amsgrad:
        return [
            f"amsgrad: the checkpoint has {old['amsgrad']!r}, the config {amsgrad!r}; its state, "
            "the maximum of past second moments, can be neither made up nor dropped: "
            "build the optimizer with the checkpoint's amsgrad (and 32-bit state if it is true)"
        ]
    return []


def _values(
    record: GroupRecord, group: Mapping[str, Any], model: type[OptimizerConfig], name: str
) -> dict[str, Any]:
    """What a group takes over from the checkpoint; its hyperparameters pass the schema.

    Raises:
        ConfigError: the schema refuses them, or they are of another family.
    """
    fields = [key for key in model.model_fields if key in group and key != "name"]
    taken = {key: copied(value) for key, value in record.values.items() if key not in _OWN}
    values = {key: taken.get(key, group[key]) for key in fields}
    checked = validate(model, {**values, "name": name}, "", "the checkpoint").model_dump()
    if record.family not in ("", model.family):
        problem = _family_problem(record, checked, group, name)
        if problem:
            raise ConfigError(problem, [problem])
        taken.pop("adam_w_mode", None)
    _check_states(model, group, checked)
    taken |= _noise(record.values, group)
    # A tensor lr stays a tensor: schedules change it in place.
    live = {"lr"} if isinstance(taken["lr"], Tensor) else set()
    return taken | {key: checked[key] for key in fields if key in taken and key not in live}


def _check_states(
    model: type[OptimizerConfig], group: Mapping[str, Any], checked: Mapping[str, Any]
) -> None:
    """Refuse hyperparameters with which other states are kept.

    Raises:
        ConfigError: names the hyperparameters that make the difference.
    """

    def states(changes: Mapping[str, Any]) -> list[str]:
        return [state.name for state in model.rule({**group, **changes}).states]

    if states(checked) == states({}):
        return
    deciding = [key for key, value in checked.items() if states({key: value}) != states({})]
    problems = [
        f"{key}: the checkpoint has {checked[key]!r}, the config {group[key]!r}, with which other "
        f"states are kept: these can be neither made up nor dropped; build the optimizer with the "
        f"checkpoint's {key}"
        for key in deciding
    ]
    raise ConfigError("\n".join(problems), problems)


def _noise(saved: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, int]:
    """The stream of random numbers to go on with, unless this run states another seed.

    Checkpoints of release 0.1 have a seed alone.
    """
    if not draws_random_numbers(group) or group["seed"] not in (None, saved.get("seed")):
        return {}
    noise = saved.get(NOISE_KEY, saved.get("seed"))
    is_number = isinstance(noise, int) and not isinstance(noise, bool)
    return {NOISE_KEY: noise} if is_number and 0 <= noise < SEEDS else {}


def _family_problem(
    record: GroupRecord, checked: Mapping[str, Any], group: Mapping[str, Any], name: str
) -> str:
    """Why state of a related family cannot be taken; empty where both compute the same."""
    if checked["weight_decay"] == 0 or record.values.get("adam_w_mode") is group["adam_w_mode"]:
        return ""
    return (
        f"optimizer: the checkpoint is of family '{record.family}', the config's name is "
        f"'{name}', and they apply the weight decay {checked['weight_decay']} differently; "
        f"take a name of family '{record.family}', or set adam_w_mode or the checkpoint's decay"
    )


@dataclass(frozen=True)
class Entries:
    """What a checkpoint has of one parameter.

    Attributes:
        record: its state; None before its first step.
        foreign: a copy of what others keep there, on the parameter's device.
    """

    record: Record | None
    foreign: dict[Any, Any]


def read_states(
    saved: Mapping[Any, Any], saved_groups: Groups, slots: list[Slot], layout: Layout
) -> tuple[dict[Slot, Entries], dict[Any, Any]]:
    """The checked entries of every parameter that has some, and a copy of what is of no parameter.

    Raises:
        StateError: fields are missing or have wrong dtypes, shapes or values; lists them.
    """
    owners = [(item, group) for group in saved_groups for item in group["params"]]
    loose = _of_no_parameter(saved, [item for item, _ in owners])
    known = States(state.name for slot in slots for state in slot.layout.rule.states)
    found: dict[Slot, Entries] = {}
    problems: list[str] = []
    for (identifier, group), slot in zip(owners, slots, strict=True):
        entries = saved.get(identifier, {})
        if not isinstance(entries, Mapping):
            problems.append(f"{slot.name}: expected a mapping, got {type(entries).__name__}")
            continue
        if not entries:  # optimizer.state is a defaultdict: a look at it makes an empty entry
            continue
        own = local_entries(entries, slot, group, known)
        fields = Fields(slot.name, entries if own else whole_entries(entries, known))
        foreign = fields.foreign(known, slot.local.device)
        has_state = any(key in known for key in entries)
        record = None
        if own:
            record = read_local(fields, slot.layout, own)
        elif has_state:
            record = layout.read_entries(fields, slot.layout, group)
        fields.expect_no_more()
        problems += fields.problems
        found[slot] = Entries(record, foreign)
    _raise(problems)
    return found, loose


def _of_no_parameter(saved: Mapping[Any, Any], identifiers: list[Any]) -> dict[Any, Any]:
    """What wrappers keep under names of their own beside the numbers of the parameters.

    Raises:
        StateError: parameters are listed in another way, or twice, or there is state of others.
    """
    if not all(isinstance(item, (int, str)) for item in identifiers):
        raise StateError("the checkpoint's param groups must list parameters by number or name")
    if len(set(identifiers)) < len(identifiers):
        raise StateError("the checkpoint's param groups list a parameter twice")
    numbered = not any(isinstance(item, str) for item in identifiers)
    others = {key: saved[key] for key in saved.keys() - set(identifiers)}
    strangers = [key for key in others if not (numbered and isinstance(key, str))]
    if strangers:
        raise StateError(f"the checkpoint has state of unknown parameters {strangers[:10]}")
    try:
        return {key: copied(value) for key, value in others.items()}
    except Exception as error:  # whatever the copy of a stranger's object raises
        raise StateError(f"cannot copy the checkpoint's state {list(others)}: {error}") from error


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
