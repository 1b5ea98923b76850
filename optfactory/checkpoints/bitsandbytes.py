"""The layout of bitsandbytes' optimizers with two states: Adam, AdamW and LAMB.

A parameter has a Python int `step`, and `state1`, `state2`: float32, or codes with a map (`qmap1`)
and scales: `absmax1`, one per block of the flattened tensor, or of old releases `max1`, one per
tensor. Blocks have 256 elements, before release 0.44 they had 2048; no field says which. Releases
from 0.49.2 on nest all but the step under one key and read both forms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from optfactory.checkpoints.convert import quantize
from optfactory.checkpoints.fields import Fields
from optfactory.checkpoints.own import read_extras
from optfactory.checkpoints.records import GroupRecord, Quantized, Record, StoredState
from optfactory.rules.language import StateSpec
from optfactory.state.codec import BlockGrid
from optfactory.state.layout import StateLayout
from optfactory.state.quantmap import map_for

NESTED = "__bnb_optimizer_quant_state__"

_BLOCK_SIZE = 256
_OLD_BLOCK_SIZE = 2048

# Of its base class; only AdEMAMix reads them.
_UNUSED: dict[str, Any] = {"alpha": 0.0, "t_alpha": None, "t_beta3": None}

_SCRATCH = ("new_max1", "new_max2", "unorm_vec")


class BitsandbytesLayout:
    """Reads and writes state dicts of bitsandbytes.

    Args:
        state: the state of a dict to read: only LAMB keeps an update norm.
    """

    families: tuple[str, ...] = ("adam", "adamw", "lamb")
    title = "bitsandbytes"
    takes_dtensors = False
    expressed: tuple[str, ...] = (
        *("lr", "betas", "eps", "weight_decay"),
        *("adam_w_mode", "amsgrad", "trust_ratio", "max_unorm"),  # see `write_problems`
    )

    def __init__(self, state: Mapping[Any, Any] | None = None) -> None:
        fields: set[Any] = set()
        for entries in (state or {}).values():
            if isinstance(entries, Mapping):
                nested = entries.get(NESTED)
                fields.update(entries, nested if isinstance(nested, Mapping) else ())
        self._one_state = "state1" in fields and "state2" not in fields
        self._family = "lamb" if "unorm_vec" in fields else "adamw" if fields else ""

    def read_group(self, saved: Mapping[str, Any]) -> GroupRecord:
        """The hyperparameters; decay is decoupled in all of bitsandbytes, also in its Adam."""
        values = {key: value for key, value in saved.items() if key not in _UNUSED}
        facts = {"amsgrad": False, "adam_w_mode": True} if self._family else {"amsgrad": False}
        problems = [
            "optimizer: the checkpoint has state1 and no state2; it is of an optimizer of "
            "bitsandbytes with one state (Lion, RMSprop, Adagrad, SGD), and only Adam, AdamW and "
            "LAMB are read; start with fresh state"
        ] * self._one_state
        return GroupRecord(self._family, {**values, **facts}, problems, self.families)

    def read_entries(
        self, fields: Fields, layout: StateLayout, saved: Mapping[str, Any]
    ) -> Record | None:
        """The states, each with the map and the scales that were stored with it."""
        fields.merge(NESTED)
        states = {
            state.name: _read(fields, state, number, layout.shape)
            for number, state in enumerate(layout.rule.states, start=1)
        }
        extras = read_extras(fields, layout)
        fields.ignore(*_SCRATCH)
        return Record.of(fields.step(), states, extras)

    def write_problems(self, group: Mapping[str, Any]) -> list[str]:
        """Hyperparameters that bitsandbytes would not obey."""
        problems = []
        if group["amsgrad"]:
            problems.append("amsgrad: bitsandbytes never computes it; train on with torch")
        if group["weight_decay"] and not group["adam_w_mode"]:
            problems.append(
                f"weight_decay: {group['weight_decay']} is L2 decay here, and all of bitsandbytes "
                "decays decoupled (as AdamW); set the group's weight_decay to 0 or adam_w_mode"
            )
        if group.get("trust_ratio", "clip") != "clip":
            problems.append(
                f"trust_ratio: {group['trust_ratio']!r} here, and bitsandbytes' LAMB clips; "
                "set the group's trust_ratio to 'clip'"
            )
        return problems

    def write_group(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """The hyperparameters that bitsandbytes saves; the rest are its constructor's."""
        values = {key: group[key] for key in ("betas", "eps", "weight_decay")}
        return {"lr": float(group["lr"]), **values, **_UNUSED}

    def write_entries(self, layout: StateLayout, record: Record) -> dict[str, Any]:
        """The flat form, which all releases read; codes in blocks of the flattened tensor."""
        entries: dict[str, Any] = {"step": int(record.step)}
        for number, state in enumerate(layout.rule.states, start=1):
            stored = record.states[state.name]
            if isinstance(stored, Tensor):
                entries[f"state{number}"] = stored.clone()
                continue
            qmap = map_for(state.signed, "table")
            quantized = quantize(stored, _flat(layout.shape, _BLOCK_SIZE), qmap)
            device = quantized.codes.device
            entries[f"state{number}"] = quantized.codes.clone()
            entries[f"qmap{number}"] = torch.tensor(qmap.values, dtype=torch.float32, device=device)
            entries[f"absmax{number}"] = quantized.scales.reshape(-1).to(device)
        if layout.rule.trust_ratio:
            device = entries["state1"].device
            entries["unorm_vec"] = torch.zeros(1, dtype=torch.float32, device=device)
        return entries


def _flat(shape: tuple[int, ...], block_size: int) -> BlockGrid:
    return BlockGrid.of((math.prod(shape),), block_size)


def _read(
    fields: Fields, state: StateSpec, number: int, shape: tuple[int, ...]
) -> StoredState | None:
    key = f"state{number}"
    if getattr(fields.peek(key), "dtype", None) != torch.uint8:
        values = fields.state(key, state, shape, (torch.float32,))
        return _contiguous(fields, key, values)
    codes = _contiguous(fields, key, fields.tensor(key, shape, (torch.uint8,)))
    qmap = fields.map(f"qmap{number}", state)
    scales_key, grid = _scales(fields, number, shape)
    scales = fields.scales(scales_key, grid.scales_shape)
    if codes is None or qmap is None or scales is None:
        return None
    return Quantized(codes, scales, grid, qmap)


def _scales(fields: Fields, number: int, shape: tuple[int, ...]) -> tuple[str, BlockGrid]:
    """Where the scales are, and the grid that their number tells."""
    blocks, tensor = f"absmax{number}", f"max{number}"
    if tensor in fields and blocks not in fields:
        return tensor, _flat(shape, max(1, math.prod(shape)))
    old = _flat(shape, _OLD_BLOCK_SIZE)
    is_old = getattr(fields.peek(blocks), "shape", None) == old.scales_shape
    return blocks, old if is_old else _flat(shape, _BLOCK_SIZE)


def _contiguous(fields: Fields, key: str, value: Tensor | None) -> Tensor | None:
    if value is None or value.is_contiguous():
        return value
    fields.note(
        key,
        "is not contiguous, and bitsandbytes orders the elements of such state differently on "
        "GPUs (as memory does) and on CPUs; put it in order with .contiguous() or .as_strided()",
    )
    return None
