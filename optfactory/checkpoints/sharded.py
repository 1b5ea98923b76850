"""Checkpoints into sharded parameters and out of them: whole tensors here, their parts there."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor

from optfactory.checkpoints import convert
from optfactory.checkpoints.fields import Fields
from optfactory.checkpoints.masters import as_gathered, as_kept
from optfactory.checkpoints.records import Record
from optfactory.sharding.dtensors import Sharding, is_dtensor, local_values
from optfactory.state.codecs import UNSCALED
from optfactory.state.layout import StateLayout
from optfactory.step.slots import Slot

# What must be as it was saved for stored blocks and codes to mean the same.
_MEANING = ("block_size", "block_wise", "compat", "signed_map")


def whole_entries(entries: Mapping[Any, Any], known: Container[object]) -> dict[Any, Any]:
    """A parameter's entries, where DTensors of known states are gathered; a collective for each."""
    return as_kept(
        {
            key: value.full_tensor() if key in known and is_dtensor(value) else value
            for key, value in as_gathered(entries).items()
        }
    )


def local_entries(
    entries: Mapping[Any, Any], slot: Slot, saved: Mapping[str, Any], known: Container[object]
) -> dict[str, Tensor] | None:
    """The state tensors of a sharded parameter if each is there as this process keeps it.

    Nothing is gathered then. None where something must be converted or resharded, or is missing.

    Args:
        saved: the checkpoint's group.
    """
    layout, entries = slot.layout, as_kept(entries)
    states = {key for key in entries if key in known}
    if layout.piece is None or states != layout.tensors.keys():
        return None
    if any(saved.get(key) != slot.group[key] for key in _MEANING):
        return None
    for key, spec in layout.tensors.items():
        if spec.sharding is not None and Sharding.of(entries[key]) != spec.sharding:
            return None
    return {key: local_values(entries[key]) for key in layout.tensors if key != "step"}


def read_local(fields: Fields, layout: StateLayout, local: Mapping[str, Tensor]) -> Record | None:
    """Check these tensors; as a record whose extras are all of them, to be copied as they are."""
    step = fields.step()
    scales = {key for state, codec in layout.stored for key in codec.keys(state)[1:]}
    floats = {state.name: UNSCALED for state in layout.rule.states}  # rounded as they are copied
    found: dict[str, Tensor | None] = {}
    for key, value in local.items():
        spec = layout.tensors[key]
        fields.replace(key, value)
        if key in scales:
            found[key] = fields.scales(key, spec.shape)
        else:
            found[key] = fields.tensor(key, spec.shape, (spec.dtype, *floats.get(key, ())))
    return Record.of(step, {}, found)


def write(layout: StateLayout, record: Record, live: Mapping[str, Tensor]) -> None:
    """Write a checked record into the live state of what this process holds of a parameter."""
    if layout.piece is None:
        convert.write(layout, record, live)
        return
    if not record.states:  # as `read_local` made it
        live["step"].copy_(record.step)
        for key, value in record.extras.items():
            live[key].copy_(value)
        return
    whole = layout.unsharded()
    device = next((x.device for x in live.values() if x.ndim), torch.device("cpu"))
    fresh = whole.allocate(device, None)
    convert.write(whole, record, fresh)
    for key, spec in layout.tensors.items():
        value = fresh[key]
        live[key].copy_(value if spec.sharding is None else value[spec.sharding.box.slices])
