"""Writing a state_dict: as torch's, but nothing in it changes while training's schedules go on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils.dlpack import from_dlpack

from optfactory.checkpoints.foreign import copied
from optfactory.checkpoints.masters import as_gathered
from optfactory.errors import StateError
from optfactory.memory import placement
from optfactory.step.callers import caller_in
from optfactory.step.slots import Slot

States = Mapping[Any, Mapping[Any, Any]]


def pack(groups: list[dict[str, Any]], state: States, slots: list[Slot]) -> dict[str, Any]:
    """The state dict of these groups: live states, and settings copied into plain Python.

    Raises:
        StateError: there is state of a tensor that is in no group.
    """
    numbers = {id(slot.parameter): slot.number for slot in slots}
    packed = {}
    for owner, entries in shareable(state, slots).items():
        if isinstance(owner, Tensor) and id(owner) not in numbers:
            raise StateError(
                f"optimizer.state has {', '.join(map(str, entries))} of a tensor of shape "
                f"{tuple(owner.shape)} that is in no param group, so that a checkpoint cannot name "
                "it; put the tensor back into a group, or delete optimizer.state[tensor]"
            )
        packed[numbers[id(owner)] if isinstance(owner, Tensor) else owner] = entries
    by_name = caller_in("torch.distributed.checkpoint.state_dict") is not None
    for slot in slots:
        if slot.number in packed and by_name:
            packed[slot.number] = as_gathered(packed[slot.number])
        if slot.layout.piece is not None and slot.number in packed:
            packed[slot.number] = wrapped(slot, packed[slot.number])
    settings = [
        {
            **{key: _setting(value) for key, value in group.items() if key != "params"},
            "params": [numbers[id(p)] for p in group["params"]],
        }
        for group in groups
    ]
    if by_name:
        # It knows parameters by name, and repeats a group's values for each of them; a key that
        # only some checkpoints have would make others unreadable.
        settings = [{**group, "param_names": ""} for group in settings]
    return {"state": packed, "param_groups": settings}


def wrapped(slot: Slot, entries: Mapping[Any, Any]) -> dict[Any, Any]:
    """The state of a sharded parameter as DTensors of the same memory.

    Their shapes do not depend on the number of processes, which is how checkpoints are resharded.
    """
    specs = slot.layout.tensors
    return {
        key: specs[key].sharding.wrap(value)  # type: ignore[union-attr]
        if key in specs and specs[key].sharding is not None and isinstance(value, Tensor)
        else value
        for key, value in entries.items()
    }


def _setting(value: Any) -> Any:
    return copied(value, other=lambda unknown: unknown)


def shareable(state: States, slots: list[Slot]) -> dict[Any, Any]:
    """The entries of a state that are not empty, with tensors that other processes can be sent.

    A tensor that is sent moves into shared memory first. Torch cannot do that with a mapped file,
    whose descriptor is closed; it takes another tensor of the same memory for ordinary memory, and
    copies it.
    """
    result = {owner: entries for owner, entries in state.items() if not _is_empty(entries)}
    for slot in slots:
        if slot.parameter in result:
            result[slot.parameter] = {
                key: _alias(value) if _is_mapped(slot, key, value) else value
                for key, value in result[slot.parameter].items()
            }
    return result


def _is_empty(entries: object) -> bool:
    return isinstance(entries, Mapping) and not entries


def _is_mapped(slot: Slot, key: Any, value: object) -> bool:
    spec = slot.layout.tensors.get(key)
    is_mapped = spec is not None and spec.where == placement.FILE_MAPPED
    return is_mapped and type(value) is Tensor and value.device.type == "cpu"


def _alias(value: Tensor) -> Tensor:
    """Another tensor of the same memory, which it keeps alive."""
    alias: Tensor = from_dlpack(value.detach())
    return alias
