"""A parameter's state carried over to a tensor with more or fewer rows."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from optfactory.checkpoints.convert import decode, write
from optfactory.checkpoints.own import live_record
from optfactory.checkpoints.records import Record
from optfactory.errors import ConfigError
from optfactory.state.layout import HISTORY_KEY, LOSS_KEY, StateLayout


def carry_over(
    old: StateLayout, state: Mapping[str, Tensor], new: StateLayout, fresh: Mapping[str, Tensor]
) -> None:
    """Copy state into the fresh state of a tensor that has other rows.

    Rows that both have keep their state, 8-bit codes and scales bit for bit where both are 8-bit;
    further rows start from zero.

    Raises:
        ConfigError: the tensors differ in more than their first dimension.
    """
    if len(old.shape) != len(new.shape) or old.shape[1:] != new.shape[1:]:
        raise ConfigError(
            f"state can follow a change of the first dimension only, got {old.shape} -> {new.shape}"
        )
    if old.quantized == new.quantized and old.options.symmetric_map == new.options.symmetric_map:
        for key in fresh.keys() & state.keys():
            _copy_rows(state[key], fresh[key])
        return
    # One is too small for 8 bits.
    record = live_record(old, state)
    states = {name: _resized(decode(stored), new.shape) for name, stored in record.states.items()}
    extras = {key: state[key] for key in (HISTORY_KEY,) if key in state}
    if LOSS_KEY in state:
        extras[LOSS_KEY] = _resized(state[LOSS_KEY], new.shape)
    write(new, Record(record.step, states, extras), fresh)


def _copy_rows(source: Tensor, target: Tensor) -> None:
    """Blocks run inside rows, so that what both have comes first in memory, scales as well."""
    common = min(source.numel(), target.numel())
    target.view(-1)[:common].copy_(source.reshape(-1)[:common])


def _resized(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    resized = torch.zeros(math.prod(shape), dtype=values.dtype, device=values.device)
    _copy_rows(values, resized)
    return resized.view(shape)
