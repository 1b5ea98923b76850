"""A parameter's state carried over to a tensor with more or fewer rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from optfactory.checkpoints.convert import decode, write
from optfactory.checkpoints.own import live_record
from optfactory.checkpoints.records import Record
from optfactory.errors import ConfigError
from optfactory.state.layout import StateLayout
from optfactory.state.specs import HISTORY_KEY, KEPT_KEYS, NEURONS_KEY
from optfactory.step.slots import Slot


def carried_over(slot: Slot, new: Tensor) -> dict[str, Any]:
    """A parameter's state as that of a tensor with other rows; empty if there is none yet.

    Rows that both have keep their state, 8-bit codes and scales bit for bit where both are 8-bit;
    further rows start as fresh state does. What other tools keep there stays where the shape
    does.

    Raises:
        ConfigError: the tensors differ in more than their first dimension.
    """
    old, shape = slot.layout, tuple(new.shape)
    if len(old.shape) != len(shape) or old.shape[1:] != shape[1:]:
        raise ConfigError(
            f"state can follow a change of the first dimension only, got {old.shape} -> {shape}"
        )
    if not slot.state:
        return {}
    layout = StateLayout.of(shape, new.device, new.dtype, slot.schema, slot.group)
    fresh = layout.allocate(new.device, slot.group["page_dir"])
    _fill(old, slot.state, layout, fresh)
    others = slot.state.items() if old.shape == shape else ()
    return {**fresh, **{key: value for key, value in others if key not in old.tensors}}


def _fill(
    old: StateLayout, state: Mapping[str, Tensor], new: StateLayout, fresh: Mapping[str, Tensor]
) -> None:
    fills = {state.name: state.fill for state in new.rule.states}
    # Further rows may share a scale with old ones, and then only 0 is there as a code.
    codes_follow = old.options.symmetric_map == new.options.symmetric_map and not any(
        fills.values()
    )
    if old.codecs == new.codecs and (codes_follow or not new.quantized):
        for key in fresh.keys() & state.keys():
            _copy_rows(state[key], fresh[key])
        return
    # One is too small for blocks, or codes have no meaning in the other.
    record = live_record(old, state)
    states = {
        name: _resized(decode(stored), new.shape, fills[name])
        for name, stored in record.states.items()
    }
    extras = {key: state[key] for key in (HISTORY_KEY,) if key in state}
    for key in (*KEPT_KEYS, NEURONS_KEY):
        if key in state and key in new.tensors:
            extras[key] = _resized(state[key], new.tensors[key].shape)
    write(new, Record(record.step, states, extras), fresh)


def _copy_rows(source: Tensor, target: Tensor) -> None:
    """Blocks run inside rows, so that what both have comes first in memory, scales as well."""
    common = min(source.numel(), target.numel())
    target.view(-1)[:common].copy_(source.reshape(-1)[:common])


def _resized(values: Tensor, shape: tuple[int, ...], fill: float = 0.0) -> Tensor:
    resized = torch.full((math.prod(shape),), fill, dtype=values.dtype, device=values.device)
    _copy_rows(values, resized)
    return resized.view(shape)
