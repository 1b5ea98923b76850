"""Putting a checkpoint in place: everything is made aside, and one call takes it over."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping
from itertools import chain, starmap
from typing import Any

import torch
from torch import Tensor

from optfactory.checkpoints import masters, sharded
from optfactory.checkpoints.reading import Entries
from optfactory.errors import StateError
from optfactory.step.slots import Slot

State = defaultdict[Any, dict[Any, Any]]


def new_state(found: Mapping[Slot, Entries], loose: Mapping[Any, Any]) -> State:
    """State of fresh tensors, placed as this optimizer's groups say, that holds a checkpoint."""
    state: State = defaultdict(dict)
    for slot, entries in found.items():
        state[slot.parameter] = dict(entries.foreign)
        if entries.record is not None:
            fresh = slot.allocate()
            sharded.write(slot.layout, entries.record, fresh)
            masters.convert(slot, entries.record, fresh)
            state[slot.parameter] |= fresh
    state.update(loose)
    return state


def take_over(
    optimizer: dict[str, Any], state: State, settings: list[dict[str, Any]], slots: list[Slot]
) -> None:
    """Give an optimizer, by its attributes, new state and settings: all of them or none.

    Args:
        settings: of each param group.
        slots: its parameters with the state that they had.
    """
    groups = optimizer["param_groups"]
    targets = [*groups, optimizer]
    values = [*settings, {"state": state, "_plan": None}]
    copies = _copies(optimizer["state"], state, groups, settings, slots)
    # What is replaced lives on until all is done: letting go of it may run Python code.
    before = [dict(target) for target in targets]
    # One call: no signal's handler and no other thread can raise between its parts.
    copying, updating = starmap(torch._foreach_copy_, copies), map(dict.update, targets, values)
    deque(chain(copying, updating), maxlen=0)
    del before


def _copies(
    live: State,
    state: State,
    groups: list[dict[str, Any]],
    settings: list[dict[str, Any]],
    slots: list[Slot],
) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Keep live tensors where a CUDA graph may have recorded their addresses.

    Returns:
        live tensors and those whose values they are to take, or nothing.
    """
    pairs: list[tuple[Tensor, Tensor]] = []
    for slot in slots:
        fresh, old = state.get(slot.parameter, {}), live.get(slot.parameter, {})
        if slot.layout.device_step and "step" in fresh and _fits(slot, old):
            pairs += [(old[key], fresh[key]) for key in slot.layout.tensors]
            fresh |= {key: old[key] for key in slot.layout.tensors}
    for group, values in zip(groups, settings, strict=True):
        lr, loaded = group["lr"], values.get("lr")
        if not (group["capturable"] and isinstance(lr, Tensor) and isinstance(loaded, Tensor)):
            continue
        if lr.shape == loaded.shape and not lr.is_inference():
            pairs.append((lr, loaded))
            values["lr"] = lr
    return [([old for old, _ in pairs], [new for _, new in pairs])] if pairs else []


def _fits(slot: Slot, state: dict[Any, Any]) -> bool:
    """Whether live state is what would be allocated anew."""
    own = {key: state[key] for key in slot.layout.tensors if key in state}
    try:
        slot.layout.check(slot.name, own, slot.local.device)
    except StateError:
        return False
    return not any(value.is_inference() for value in own.values())
