"""The parameters of an optimizer, each with all that its update needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from optfactory.config.schema import OptimizerConfig
from optfactory.config.validation import config_error
from optfactory.errors import ConfigError
from optfactory.group_schema import OPTIMIZER_KEY
from optfactory.groups.parameters import parameter_names, parameter_problem
from optfactory.memory import placement
from optfactory.sharding.dtensors import Sharding, local_tensor
from optfactory.state import masters
from optfactory.state.layout import StateLayout
from optfactory.state.specs import EXTRA_KEYS, KEPT_KEYS

Group = Mapping[str, Any]
Schema = type[OptimizerConfig]


@dataclass(eq=False)
class Slot:
    """One parameter with all that its update needs; compared by identity.

    Attributes:
        parameter, name: the tensor, and its name for messages.
        local: what this process holds of it, which kernels update; itself if it is not sharded.
        number: which of the optimizer's parameters it is.
        group: its torch param group, read at every step.
        schema: of the group's family, which computes the scalars.
        layout: how its state is stored.
        state: its state tensors by key, and what others keep beside them; empty until
            `Optimizer2State.init_states`.
        held: what a backend notes of the state; see `optfactory.backends.held`.
    """

    parameter: Tensor
    name: str
    number: int
    group: dict[str, Any]
    schema: Schema
    layout: StateLayout
    state: dict[str, Tensor] = field(default_factory=dict)
    held: Any = None

    @property
    def local(self) -> Tensor:
        return local_tensor(self.parameter)

    @property
    def is_trained(self) -> bool:
        """Whether the parameter needs state."""
        return self.parameter.requires_grad or self.parameter.grad is not None

    def holds_all(self, entries: Mapping[str, Any]) -> bool:
        """Whether a mapping has all state of this parameter."""
        return self.layout.tensors.keys() <= entries.keys()

    def allocate(self) -> dict[str, Tensor]:
        """Fresh state for this parameter, placed as its group says."""
        return self.layout.allocate(self.local.device, self.group["page_dir"])

    def follow(self, entries: dict[str, Any]) -> None:
        """Take the parameter's live state; what there is not yet is allocated in it.

        Other tools keep keys of their own there, which stay.

        Raises:
            ConfigError: the parameter cannot be trained.
            StateError: a part of the state is missing.
        """
        self.held = None
        kept = {key: entries[key] for key in KEPT_KEYS if key in entries}
        missing = self.layout.tensors.keys() - entries.keys()
        # An option that is switched on later keeps its own from then on, and drops it when off.
        for key in EXTRA_KEYS:
            if key not in self.layout.tensors:
                entries.pop(key, None)
        if missing == self.layout.tensors.keys():
            problem = parameter_problem(self.parameter)  # a frozen one may be of any kind
            if problem:
                raise ConfigError(f"cannot update {self.name}: {problem}")
            entries.update(self.allocate())
        elif missing <= set(EXTRA_KEYS):
            for key in missing:
                device, folder = self.local.device, self.group["page_dir"]
                entries[key] = self.layout.tensors[key].allocate(device, folder)
            if self.layout.kept_key in missing:
                masters.carry(self.local, kept, entries, self.layout.kept_key)
        else:
            self.layout.check(self.name, entries, self.local.device)
        self.state = entries


def make_slots(
    groups: Sequence[dict[str, Any]],
    states: Mapping[Tensor, dict[str, Tensor]],
    schema_of: Callable[[Group], Schema],
    old: Iterable[Slot],
) -> list[Slot]:
    """A slot for each parameter in order.

    Groups may have been edited in place: names follow their tensors, and new ones get some.

    Args:
        schema_of: the schema of a group's family.
        old: the slots so far.

    Raises:
        ConfigError: a new parameter cannot be optimized, or one is listed twice.
    """
    known = {id(slot.parameter): slot for slot in old}
    _check_new(groups, known)
    slots: list[Slot] = []
    for index, group in enumerate(groups):
        _realign_names(group, index, known)
        layouts: dict[tuple[Any, ...], StateLayout] = {}
        schema = schema_of(group)
        for name, p in zip(parameter_names(group, index), group["params"], strict=True):
            facts = (tuple(p.shape), local_tensor(p).device, p.dtype)
            key = (*facts, Sharding.of(p))
            if key not in layouts:
                layouts[key] = StateLayout.of(*facts, schema, group, key[-1])
            before = known.get(id(p))
            # State of a parameter that was resized is still that of its old shape.
            resized = before is not None and bool(before.state) and before.layout.shape != facts[0]
            layout = before.layout if before is not None and resized else layouts[key]
            slots.append(Slot(p, name, len(slots), group, schema, layout, states.get(p, {})))
    return slots


def _check_new(groups: Sequence[Group], known: Mapping[int, Slot]) -> None:
    """Refuse what was put into a group's list and cannot be optimized."""
    if not known:
        return  # nothing was edited: they have just been checked
    problems, seen = [], set()
    for index, group in enumerate(groups):
        for number, p in enumerate(group["params"]):
            place = f"param_groups[{index}].params[{number}]"
            if id(p) in seen:
                problems.append(f"{place}: is listed twice; list every parameter once")
            seen.add(id(p))
            is_new = id(p) not in known and (not isinstance(p, Tensor) or p.requires_grad)
            problem = parameter_problem(p) if is_new else None
            if problem:
                problems.append(f"{place}: {problem}")
    if problems:
        raise config_error("an optimizer's parameters", problems)


def _realign_names(group: dict[str, Any], index: int, known: Mapping[int, Slot]) -> None:
    names, params = group.get("param_names"), group["params"]
    if names is None or (not known and len(names) == len(params)):
        return
    found = [known[id(p)].name if id(p) in known else None for p in params]
    if len(names) == len(params):
        found = [old or name for old, name in zip(found, names, strict=True)]
    named = [name or f"param_groups[{index}].params[{i}]" for i, name in enumerate(found)]
    if len(set(named)) < len(named):
        named = [
            name if name not in named[:i] else f"param_groups[{index}].params[{i}]"
            for i, name in enumerate(named)
        ]
    if named != names:
        group["param_names"] = named


def refuse_changed_storage(
    old: Iterable[Slot], groups: Sequence[Group], before: Mapping[int, Group]
) -> None:
    """Refuse changes of groups that the state which is there cannot follow.

    Args:
        old: the slots as they were made; their groups may have changed since.
        groups: all param groups.
        before: what groups said when the slots were made, by their id.

    Raises:
        ConfigError: names every such key.
    """
    problems: dict[str, None] = {}
    numbers = {id(group): index for index, group in enumerate(groups)}
    for slot in old:
        was, now = before.get(id(slot.group)), slot.group
        if not slot.state or was is None or id(now) not in numbers:
            continue
        for key in [key for key in was if was[key] != now[key]]:
            if not _can_follow(slot, was, {**was, key: now[key]}, key):
                problems[
                    f"param_groups[{numbers[id(now)]}].{key}: was {was[key]!r} when the state was "
                    f"made, and cannot become {now[key]!r} now; set it back, or build a new "
                    "optimizer and load this one's state_dict, which converts what can be"
                ] = None
    if problems:
        raise config_error("a param group that changed", list(problems))


def _can_follow(slot: Slot, was: Group, now: Group, key: str) -> bool:
    p = slot.parameter
    if key == OPTIMIZER_KEY:
        return False  # its fields are others, and what they mean
    if key == "page_dir":
        return slot.layout.where != placement.FILE_MAPPED
    device, sharding = slot.local.device, Sharding.of(p)
    old, new = (
        StateLayout.of(slot.layout.shape, device, p.dtype, slot.schema, values, sharding)
        for values in (was, now)
    )
    return old.holds_state_of(new)
