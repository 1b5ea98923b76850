"""The layout of bitsandbytes' optimizers; a family's `bitsandbytes_peer` says which are its own.

A parameter has a Python int `step`, and `state1`, `state2`: float32, or codes with a map (`qmap1`)
and scales: `absmax1`, one per block of the flattened tensor, or of old releases `max1`, one per
tensor. Blocks have 256 elements, before release 0.44 they had 2048; no field says which. Releases
from 0.49.2 on nest all but the step under one key and read both forms. AdEMAMix's `state1` and
`absmax1` hold two states, one behind the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from optfactory.checkpoints.convert import decode, quantize
from optfactory.checkpoints.fields import Fields
from optfactory.checkpoints.own import read_extras
from optfactory.checkpoints.peers import model_of, peers_of
from optfactory.checkpoints.records import GroupRecord, Quantized, Record, StoredState
from optfactory.checkpoints.stacked import HALVES, join, split
from optfactory.config.peers import BitsandbytesPeer
from optfactory.rules.language import StateSpec
from optfactory.state.codec import BlockGrid
from optfactory.state.layout import StateLayout
from optfactory.state.quantmap import QuantizationMap, map_for

NESTED = "__bnb_optimizer_quant_state__"

_BLOCK_SIZE = 256
_OLD_BLOCK_SIZE = 2048

# Of the base class with two states; only AdEMAMix reads them.
_UNUSED: dict[str, Any] = {"alpha": 0.0, "t_alpha": None, "t_beta3": None}

# Of Adam, LAMB and LARS; `write_problems` says which values of these have no counterpart.
_REFUSED = ("adam_w_mode", "amsgrad", "trust_ratio", "max_unorm")

_SCRATCH = ("new_max1", "new_max2", "unorm_vec")


class BitsandbytesLayout:
    """Reads and writes state dicts of bitsandbytes.

    Args:
        state: the state of a dict to read: how many states there are, and whether norms are.
        family: of an optimizer to write the state of.
    """

    title = "bitsandbytes"
    takes_dtensors = False

    def __init__(self, state: Mapping[Any, Any] | None = None, family: str = "") -> None:
        fields: set[Any] = set()
        for entries in (state or {}).values():
            if isinstance(entries, Mapping):
                nested = entries.get(NESTED)
                fields.update(entries, nested if isinstance(nested, Mapping) else ())
        self._fresh = not fields
        self._states = 1 if "state1" in fields and "state2" not in fields else 2
        self._norm = "unorm_vec" in fields
        self._peers = peers_of(BitsandbytesPeer)
        self.families: tuple[str, ...] = (family,) if family in self._peers else ()
        self._family = family

    @property
    def expressed(self) -> tuple[str, ...]:
        """What groups have, and what `write_problems` speaks of."""
        peer = self._peers[self._family]
        ours = (*(peer.betas or ("betas",)), *peer.scheduled)
        return ("lr", "eps", "weight_decay", *ours, *_REFUSED)

    def _possible(self, saved: Mapping[str, Any]) -> tuple[str, ...]:
        """The families that a group's numbers can be of."""
        try:
            betas, eps = tuple(float(beta) for beta in saved["betas"]), float(saved["eps"])
        except (KeyError, TypeError, ValueError):
            betas, eps = (), 0.0
        if len(betas) < 2:  # damaged, which is told when its fields are read
            betas = (0.9, 0.999)
        return tuple(
            family
            for family, peer in self._peers.items()
            if peer.states == self._states
            and (self._fresh or peer.norm == self._norm)
            and peer.is_it(betas, eps)
        )

    def read_group(self, saved: Mapping[str, Any]) -> GroupRecord:
        """The hyperparameters under our names, and what the library does whatever it is asked."""
        families = self._possible(saved)
        if not families:
            kind = f"{self._states} state{'s' * (self._states > 1)}"
            norm = " and the norm of an update" * self._norm
            problem = f"of an optimizer of bitsandbytes with {kind}{norm} that is not known here"
            return GroupRecord("", saved, [f"optimizer: the checkpoint is {problem}"])
        family = "" if len(families) > 1 else families[0]
        if not self._fresh and not family:
            family = next(f for f in families if _decays_apart(f))
        peer, fields = self._peers[family or families[0]], model_of(families[0]).model_fields
        gone = {*_UNUSED, *{"betas", "eps"} - fields.keys()} - {*peer.scheduled}
        values = {key: value for key, value in saved.items() if key not in gone}
        given = saved.get("betas", ())
        if isinstance(given, (list, tuple)) and len(given) == len(peer.betas):
            values |= {ours: beta for ours, beta in zip(peer.betas, given, strict=True) if ours}
        known = {key: value for key, value in peer.fixed.items() if family or key != "adam_w_mode"}
        return GroupRecord(family, {**values, **known}, [], families)

    def read_entries(
        self, fields: Fields, layout: StateLayout, saved: Mapping[str, Any]
    ) -> Record | None:
        """The states, each with the map and the scales that were stored with it."""
        fields.merge(NESTED)
        stacked = self._peers[self._possible(saved)[0]].stacked
        if stacked and not split(fields, layout.shape, _BLOCK_SIZE):
            return None
        numbers = _numbers(layout, stacked)
        states = {
            state.name: _read(fields, state, number, layout.shape)
            for state, number in zip(layout.rule.states, numbers, strict=True)
        }
        extras = read_extras(fields, layout)
        fields.ignore(*_SCRATCH)
        return Record.of(fields.step(), states, extras)

    def write_problems(self, group: Mapping[str, Any]) -> list[str]:
        """Hyperparameters that bitsandbytes would not obey."""
        problems = []
        if group.get("amsgrad"):
            problems.append("amsgrad: bitsandbytes never computes it; train on with torch")
        if group["weight_decay"] and not group.get("adam_w_mode", True):
            problems.append(
                f"weight_decay: {group['weight_decay']} is L2 decay here, and all of bitsandbytes "
                "decays decoupled (as AdamW); set the group's weight_decay to 0 or adam_w_mode"
            )
        if group.get("trust_ratio", "clip") != "clip":
            problems.append(
                f"trust_ratio: {group['trust_ratio']!r} here, and bitsandbytes' "
                f"{self._family.upper()} clips; "
                "set the group's trust_ratio to 'clip'"
            )
        if "momentum" in self._peers[self._family].betas and not group["momentum"]:
            name = self._family.upper()
            problems.append(f"momentum: 0 here, and bitsandbytes has no {name} without momentum")
        return problems

    def write_group(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """The hyperparameters that bitsandbytes saves; the rest are its constructor's."""
        peer = self._peers[self._family]
        betas = tuple(group.get(ours, 0.0) for ours in peer.betas) or group["betas"]
        values = {
            "lr": float(group["lr"]),
            "betas": betas,
            "eps": group.get("eps", 0.0),
            "weight_decay": group["weight_decay"],
        }
        if peer.states == 1:
            return values
        return {**values, **_UNUSED, **{key: group[key] for key in peer.scheduled}}

    def write_entries(
        self, layout: StateLayout, record: Record, group: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The flat form, which all releases read; codes in blocks of the flattened tensor."""
        stacked = self._peers[self._family].stacked
        numbers = _numbers(layout, stacked)
        # On GPUs, the second of two states of broken blocks would begin in the first one's scales.
        widen = stacked and math.prod(layout.shape) % _BLOCK_SIZE != 0
        entries: dict[str, Any] = {"step": int(record.step)}
        for state, number in zip(layout.rule.states, numbers, strict=True):
            stored = record.states[state.name]
            entries |= _written(decode(stored) if widen else stored, number, layout.shape)
        entries = join(entries) if stacked else entries
        if layout.rule.trust_ratio:
            device = entries["state1"].device
            entries["unorm_vec"] = torch.zeros(1, dtype=torch.float32, device=device)
        return entries


def _flat(shape: tuple[int, ...], block_size: int) -> BlockGrid:
    return BlockGrid.of((math.prod(shape),), block_size)


def _decays_apart(family: str) -> bool:
    """Whether a family's weight decay is decoupled by default, as in all of bitsandbytes."""
    field = model_of(family).model_fields.get("adam_w_mode")
    return field is None or field.default is True


def _numbers(layout: StateLayout, stacked: bool) -> tuple[str, ...]:
    """What states are called behind `state`, `qmap` and `absmax`."""
    count = len(layout.rule.states)
    return (*HALVES, "2") if stacked else tuple(str(number + 1) for number in range(count))


def _is_signed(number: str) -> bool:
    """Whether a state is stored in the signed map: the first is, whatever it holds."""
    return number.startswith("1")


def _written(stored: StoredState, number: str, shape: tuple[int, ...]) -> dict[str, Any]:
    if isinstance(stored, Tensor):
        return {f"state{number}": stored.clone()}
    qmap = map_for(_is_signed(number), "table")
    quantized = quantize(stored, _flat(shape, _BLOCK_SIZE), qmap)
    device = quantized.codes.device
    return {
        f"state{number}": quantized.codes.clone(),
        f"qmap{number}": torch.tensor(qmap.values, dtype=torch.float32, device=device),
        f"absmax{number}": quantized.scales.reshape(-1).to(device),
    }


def _read(
    fields: Fields, state: StateSpec, number: str, shape: tuple[int, ...]
) -> StoredState | None:
    key = f"state{number}"
    if getattr(fields.peek(key), "dtype", None) != torch.uint8:
        values = fields.state(key, state, shape, (torch.float32,))
        return _contiguous(fields, key, values)
    codes = _contiguous(fields, key, fields.tensor(key, shape, (torch.uint8,)))
    qmap = fields.map(f"qmap{number}", replace(state, signed=_is_signed(number)))
    scales_key, grid = _scales(fields, number, shape)
    scales = fields.scales(scales_key, grid.scales_shape)
    if codes is None or qmap is None or scales is None:
        return None
    if _is_signed(number) and not state.signed and _has_negatives(codes, qmap):
        fields.note(key, "has negative elements, which this state never has")
        return None
    return Quantized(codes, scales, grid, qmap)


def _has_negatives(codes: Tensor, qmap: QuantizationMap) -> bool:
    negative = torch.tensor(qmap.values, dtype=torch.float32, device=codes.device) < 0
    return bool(negative[codes.int()].any())


def _scales(fields: Fields, number: str, shape: tuple[int, ...]) -> tuple[str, BlockGrid]:
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
