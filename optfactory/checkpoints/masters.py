"""Masters of 16-bit parameters in checkpoints: gathered, and converted to another kind.

What is kept beside a parameter means something beside the value that was saved with it, so that it
is converted beside the parameter's present value: load the model first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from optfactory.checkpoints.records import Record
from optfactory.sharding.dtensors import Sharding, is_dtensor, local_values
from optfactory.state import masters
from optfactory.state.specs import KEPT_KEYS, LOW_KEY
from optfactory.step.slots import Slot


def convert(slot: Slot, record: Record, fresh: Mapping[str, Tensor]) -> None:
    """Give a parameter's fresh state what the checkpoint kept beside it in another way."""
    key = slot.layout.kept_key
    if not key or key in record.extras:
        return
    sharding = slot.layout.tensors[key].sharding
    part = (...,) if sharding is None else sharding.box.slices
    found = {k: record.extras[k][part] for k in KEPT_KEYS if k in record.extras}
    masters.carry(slot.local, found, fresh, key)


def as_gathered(entries: Mapping[Any, Any]) -> dict[Any, Any]:
    """Entries whose halves of masters pass for bfloat16: no collective takes 16-bit integers."""
    return _read_as(entries, torch.int16, torch.bfloat16)


def as_kept(entries: Mapping[Any, Any]) -> dict[Any, Any]:
    """Entries whose halves of masters are integers again."""
    return _read_as(entries, torch.bfloat16, torch.int16)


def _read_as(entries: Mapping[Any, Any], old: torch.dtype, new: torch.dtype) -> dict[Any, Any]:
    value = entries.get(LOW_KEY)
    if not isinstance(value, Tensor) or value.dtype != old:
        return dict(entries)
    sharding = Sharding.of(value) if is_dtensor(value) else None
    viewed = value.view(new) if sharding is None else sharding.wrap(local_values(value).view(new))
    return {**entries, LOW_KEY: viewed}
