"""The layout of torchao's low-bit Adam and AdamW: `torchao.optim.AdamW8bit` and the like.

Groups, steps and small states are as torch's. Other states are tensors of classes that hold codes
and the scales of blocks of the flattened tensor:

| class | elements a block | codes | numbers |
|---|---|---|---|
| `OptimState8bit` | 256 | uint8, of the state's shape | `qmap`: bitsandbytes' dynamic maps |
| `OptimState4bit` | 128 | two a byte, flat, the first in the upper half | `qmap`: 16 of them |
| `OptimStateFp8` | 256 | float8_e4m3fn, of the state's shape | with a sign, needed or not |

The number of scales tells the size of blocks. No state dict says whether weight decay is decoupled:
the optimizer's class does, which is not in it. The classes are known by their names, so that
reading needs no torchao; writing makes tensors of them, and does.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from optfactory.checkpoints.convert import decode, quantize
from optfactory.checkpoints.fields import FLOATS, Fields
from optfactory.checkpoints.peers import model_of, peers_of
from optfactory.checkpoints.records import GroupRecord, Quantized, Record, StoredState
from optfactory.checkpoints.torch import TorchLayout
from optfactory.config.peers import TorchaoPeer
from optfactory.errors import ConfigError, StateError
from optfactory.rules.language import StateSpec
from optfactory.sharding.dtensors import is_dtensor, local_values
from optfactory.state.codec import BlockGrid
from optfactory.state.codecs import EIGHT_BIT, FOUR_BIT, FP8, Codec
from optfactory.state.layout import StateLayout
from optfactory.state.minifloats import E4M3, unpacked
from optfactory.state.quantmap import map_for

_EIGHT, _FOUR, _FP8 = "OptimState8bit", "OptimState4bit", "OptimStateFp8"
_CLASSES = {EIGHT_BIT: _EIGHT, FOUR_BIT: _FOUR, FP8: _FP8}
_BLOCK_SIZES = {_EIGHT: 256, _FOUR: 128, _FP8: 256}
_PARTS = ("codes", "scale", "qmap")

# Our e4m3 has the codes of float8_e4m3fn, for numbers of 2^-8 the size.
_E4M3_BY_OURS = 2.0**8
_MINUS_ZERO = 0x80
_NAN = 0x7F


class TorchaoLayout:
    """Reads and writes state dicts of torchao.

    Args:
        family: of an optimizer to write the state of; any that it has without one.
    """

    takes_dtensors = False
    expressed = (
        *("lr", "betas", "eps", "weight_decay", "amsgrad"),
        *("adam_w_mode", "param_rounding"),  # `write_problems` speaks of these
    )

    def __init__(self, family: str = "") -> None:
        self._peers = peers_of(TorchaoPeer)
        self._family = family
        self.families = tuple(name for name in self._peers if not family or name == family)
        names = [self._peers[item].name for item in self.families or self._peers]
        self.title = " or ".join(f"torchao.optim.{name}{{4bit,8bit,Fp8}}" for name in names)

    @classmethod
    def of_state(cls, state: Mapping[Any, Any]) -> TorchaoLayout | None:
        """The layout of a checkpoint with this state; None if no state is of a class of torchao.

        Raises:
            StateError: one is, as the local tensor of a DTensor.
        """
        found = [(owner, key, value) for owner, key, value in _values(state) if _kind(value)]
        for owner, key, value in found:
            if is_dtensor(value):
                raise StateError(
                    f"state[{owner!r}].{key}: is a DTensor of torchao's {_kind(value)}; its blocks "
                    "are those of one process's part, and cannot be converted; load the checkpoint "
                    "into torchao's optimizer, and save state whose DTensors were made whole with "
                    ".full_tensor()"
                )
        return cls() if found else None

    def read_group(self, saved: Mapping[str, Any]) -> GroupRecord:
        """As torch's; a learning rate is a tensor there whatever was asked for, and none here."""
        record = TorchLayout(self.families).read_group(saved)
        lr = record.values.get("lr")
        if isinstance(lr, Tensor) and lr.numel() == 1:
            return replace(record, values={**record.values, "lr": float(lr)})
        return record

    def read_entries(
        self, fields: Fields, layout: StateLayout, saved: Mapping[str, Any]
    ) -> Record | None:
        """The states, each as it is stored; what overflowed in float32, where that shows."""
        states = {s.name: _read(fields, s, layout.shape) for s in layout.rule.states}
        return Record.of(fields.step(), states)

    def write_problems(self, group: Mapping[str, Any]) -> list[str]:
        """Where torchao's class of the family decays, or rounds parameters, otherwise."""
        problems = []
        apart, default = group["adam_w_mode"], model_of(self._family).model_fields["adam_w_mode"]
        if group["weight_decay"] and apart is not default.default:
            way = "adds weight decay to the gradient" if apart else "decays decoupled"
            problems.append(
                f"adam_w_mode: {apart} here, and torchao's {self._peers[self._family].name} {way}; "
                f"load the state into a name of family '{'adamw' if apart else 'adam'}' and export "
                "that, or set the group's weight_decay to 0"
            )
        if group["param_rounding"] not in ("nearest", "stochastic"):
            problems.append(
                f"param_rounding: {group['param_rounding']!r} here, and torchao rounds to nearest, "
                "or at random with bf16_stochastic_round=True; set one of these"
            )
        return problems

    def write_group(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """The hyperparameters; torchao takes a learning rate that is a tensor only."""
        lr = torch.tensor(float(group["lr"]), dtype=torch.float32, device="cpu")
        return {
            "lr": lr,
            **{key: group[key] for key in ("betas", "eps", "weight_decay", "amsgrad")},
        }

    def write_entries(
        self, layout: StateLayout, record: Record, group: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Codes where there are codes here that torchao's blocks divide; otherwise float32."""
        states = {
            spec.name: _written(record.states[spec.name], spec, own) for spec, own in layout.stored
        }
        return {"step": record.step.float(), **states}


def _values(state: Mapping[Any, Any]) -> Iterator[tuple[Any, Any, Any]]:
    for owner, entries in state.items():
        if isinstance(entries, Mapping):
            yield from ((owner, key, value) for key, value in entries.items())


def _kind(value: object) -> str:
    """The name of torchao's class that a value, or its local tensor, is of; empty if of none."""
    local = local_values(value) if isinstance(value, Tensor) and is_dtensor(value) else value
    name = type(local).__name__
    return name if isinstance(local, Tensor) and name in _BLOCK_SIZES else ""


def _flat(shape: tuple[int, ...], block_size: int) -> BlockGrid:
    return BlockGrid.of(shape, block_size, flat=True)


# ---- reading --------------------------------------------------------------------------------


def _read(fields: Fields, state: StateSpec, shape: tuple[int, ...]) -> StoredState | None:
    key, value = state.name, fields.peek(state.name)
    kind = _kind(value)
    if not kind or not isinstance(value, Tensor):
        return fields.state(key, state, shape, FLOATS)
    fields.ignore(key)
    if tuple(value.shape) != shape:
        fields.note(key, f"expected shape {shape}, got {tuple(value.shape)}")
        return None
    parts = {f"{key}.{part}": getattr(value, part, None) for part in _PARTS}
    for name, part in parts.items():
        if part is not None:
            fields.replace(name, part)
    read = _read_fp8 if kind == _FP8 else _read_8bit if kind == _EIGHT else _read_4bit
    stored = read(fields, state, shape)
    fields.ignore(*parts)
    return stored


def _read_8bit(fields: Fields, state: StateSpec, shape: tuple[int, ...]) -> StoredState | None:
    codes = fields.tensor(f"{state.name}.codes", shape, (torch.uint8,))
    qmap = fields.map(f"{state.name}.qmap", state)
    scales = _scales(fields, f"{state.name}.scale", shape)
    if codes is None or qmap is None or scales is None:
        return None
    return _shown(Quantized(codes, scales, _grid(shape, scales), qmap))


def _read_4bit(fields: Fields, state: StateSpec, shape: tuple[int, ...]) -> StoredState | None:
    key, numel = f"{state.name}.codes", math.prod(shape)
    if numel % 2:
        fields.note(key, f"{numel} elements are an odd number, and a byte holds two")
        return None
    pairs = fields.tensor(key, (numel // 2,), (torch.uint8,))
    qmap = fields.map(f"{state.name}.qmap", state, size=16)
    scales = _scales(fields, f"{state.name}.scale", shape)
    if pairs is None or qmap is None or scales is None:
        return None
    return _shown(Quantized(unpacked(pairs).reshape(shape), scales, _grid(shape, scales), qmap))


def _read_fp8(fields: Fields, state: StateSpec, shape: tuple[int, ...]) -> StoredState | None:
    key = f"{state.name}.codes"
    codes = fields.tensor(key, shape, (torch.float8_e4m3fn,))
    scales = _scales(fields, f"{state.name}.scale", shape)
    if codes is None or scales is None:
        return None
    bits = codes.view(torch.uint8)
    bits = bits.masked_fill(bits == _MINUS_ZERO, 0)  # no code of ours
    if not state.signed and bool((bits > _MINUS_ZERO).any()):
        fields.note(key, "has negative elements, which this state never has")
        return None
    ours = scales * _E4M3_BY_OURS
    if bool(ours.isfinite().all()) and not bool((bits & _NAN == _NAN).any()):
        return Quantized(bits, ours, _grid(shape, scales), E4M3)
    return (codes.float().reshape(scales.numel(), -1) * scales[:, None]).reshape(shape)


def _scales(fields: Fields, key: str, shape: tuple[int, ...]) -> Tensor | None:
    """The scales, however many blocks there are; one that overflowed is none of a damaged file."""
    value, numel = fields.peek(key), math.prod(shape)
    count = value.numel() if isinstance(value, Tensor) else 1
    if not 0 < count <= numel or numel % count:
        fields.note(key, f"{count} scales, which do not divide {numel} elements into blocks")
        return None
    return fields.scales(key, (count,), finite=False)


def _grid(shape: tuple[int, ...], scales: Tensor) -> BlockGrid:
    return _flat(shape, math.prod(shape) // scales.numel())


def _shown(stored: Quantized) -> StoredState:
    """The state, or its values if a scale is infinite or NaN: a gradient was, in that block."""
    return stored if bool(stored.scales.isfinite().all()) else decode(stored)


# ---- writing --------------------------------------------------------------------------------


def _written(stored: StoredState, state: StateSpec, codec: Codec) -> Tensor:
    kind = _CLASSES.get(codec, "")
    if not isinstance(stored, Quantized) or stored.codes.numel() % _BLOCK_SIZES[kind]:
        return decode(stored).clone()
    shape, device = tuple(stored.codes.shape), stored.codes.device
    signed = {} if kind == _FP8 else {"signed": state.signed}
    target = _class(kind).zeros(shape, block_size=_BLOCK_SIZES[kind], device=device, **signed)
    if kind == _FOUR:
        target.copy_(decode(stored))  # torchao's own rounding: its maps are no others'
    elif kind == _EIGHT:
        grid = _flat(shape, _BLOCK_SIZES[kind])
        quantized = quantize(stored, grid, map_for(state.signed, "table"))
        target.codes.copy_(quantized.codes)
        target.scale.copy_(quantized.scales.reshape(-1))
    else:
        quantized = quantize(stored, _flat(shape, _BLOCK_SIZES[kind]), E4M3)
        codes = quantized.codes
        if not state.signed:  # a root of 0 would divide what is left of the momentum
            codes = codes.masked_fill((codes == 0) & (decode(stored) > 0), 1)
        target.codes.view(torch.uint8).copy_(codes)
        target.scale.copy_(quantized.scales.reshape(-1) / _E4M3_BY_OURS)
    result: Tensor = target
    return result


def _class(kind: str) -> Any:
    """A class of torchao.

    Raises:
        ConfigError: torchao is not there, or has no such class.
    """
    module = f"torchao.optim.subclass_{kind.removeprefix('OptimState').lower()}"
    try:
        return getattr(importlib.import_module(module), kind)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"a state dict of torchao holds tensors of its class {kind}, and {module} cannot be "
            f"imported ({error}); pip install torchao, or export 'torch' (float32 state)"
        ) from error
