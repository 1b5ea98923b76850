"""Tools of the checkpoint tests: other libraries, and states decoded without the package."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests.families import FAMILIES, states_of
from tests.numerics.harness import ENDS, placed
from tests.reference import quantization as oracle
from tests.reference.tables import SIGNED, UNSIGNED

Array = NDArray[Any]
StateDict = dict[str, Any]

NESTED = "__bnb_optimizer_quant_state__"

# Rows of whole blocks, rows with a tail, one row, short rows; too few elements for 8 bits.
SHAPES = [(18, 512), (20, 300), (4097,), (64, 70), (255,), ()]

CODECS = {
    state.name: oracle.SIGNED_CODEC if state.signed else oracle.UNSIGNED_CODEC
    for family in FAMILIES
    for state in states_of(family)
}
# What bitsandbytes stores, with our scales.
TABLES = {
    name: oracle.Codec(SIGNED, codec.zero_code, floor=False)
    if codec is oracle.SIGNED_CODEC
    else oracle.Codec(UNSIGNED, codec.zero_code, floor=True)
    for name, codec in CODECS.items()
}


def peer(name: str) -> Any:
    """Another library's module; the test is skipped without it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip(name.partition(".")[0])
        return importlib.import_module(name)


def weights(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in SHAPES]


def array(tensor: Tensor) -> Array:
    result: Array = tensor.detach().cpu().float().numpy()
    return result


def width_of(entries: dict[str, Tensor], name: str) -> str:
    """How a state of ours is stored in codes; empty if it is in numbers."""
    return next((width for width, end in ENDS.items() if f"{name}{end}" in entries), "")


def _small(entries: dict[str, Tensor], name: str, width: str, block: int) -> tuple[Any, Any, int]:
    """Places of codes with their scales, the codec, and its blocks, of small floats."""
    signed, halves = CODECS[name] is oracle.SIGNED_CODEC, 2 if width == "4bit" else 1
    *rows, last = entries[f"{name}{ENDS[width]}"].shape
    stored = placed(entries, name, width, signed, (*rows, halves * last))
    return stored, oracle.SMALL[width][signed][0], block // halves


def assert_quantized(
    entries: dict[str, Tensor], values: Array, name: str, block: int = 256
) -> None:
    """One of our states is these values in the nearest codes."""
    width = width_of(entries, name)
    if width in oracle.SMALL:
        stored, codec, own = _small(entries, name, width, block)
        oracle.assert_encodes(stored.codes, stored.scales, values, codec, own)
        return
    codes, scales = (entries[f"{name}_{kind}"].numpy() for kind in ("q8", "absmax"))
    oracle.assert_encodes(codes, scales, values, CODECS[name], block)


def decoded(codes: Array, scales: Array, name: str, block: int = 256) -> Array:
    """Float32 values of our codes."""
    return oracle.decode32(codes, scales, CODECS[name], block)


def encoded_flat(values: Array, name: str, block: int = 256) -> tuple[Array, Array]:
    """Codes and scales of bitsandbytes' map, in blocks of the flattened tensor."""
    codes, scales = oracle.encode(values.reshape(-1), TABLES[name], None, block)
    return codes.reshape(values.shape), scales


def decoded_flat(codes: Array, scales: Array, name: str, block: int = 256) -> Array:
    """Float32 values of codes in blocks of the flattened tensor."""
    values = oracle.decode32(codes.reshape(-1), scales, TABLES[name], block)
    return values.reshape(codes.shape)


def values_of(entries: dict[str, Tensor], name: str, block: int = 256) -> Array:
    """The values of one of our states, of any width."""
    if name in entries:
        return array(entries[name])
    width = width_of(entries, name)
    if width in oracle.SMALL:
        stored, codec, own = _small(entries, name, width, block)
        return oracle.decode32(stored.codes, stored.scales, codec, own)
    codes, scales = entries[f"{name}_q8"], entries[f"{name}_absmax"]
    return decoded(codes.numpy(), scales.numpy(), name, block=block)


def values_of_bitsandbytes(entries: StateDict, name: str, block: int = 256) -> Array:
    """The values of a state of bitsandbytes, by the map that is stored with it."""
    entries = {**entries, **entries.get(NESTED, {})}
    number = {"exp_avg": 1, "exp_avg_sq": 2}[name]
    state = entries[f"state{number}"]
    if state.dtype == torch.float32:
        return array(state)
    scales = entries[f"absmax{number}"].numpy().repeat(block)[: state.numel()]
    table = entries[f"qmap{number}"].numpy()
    result: Array = (table[state.numpy()] * scales.reshape(state.shape)).astype(np.float32)
    return result


def same(one: Array, other: Array) -> bool:
    """Equal bit for bit."""
    return one.shape == other.shape and one.tobytes() == other.tobytes()


def alike(one: Array, other: Array) -> bool:
    """Equal up to the last bits in which values of codes differ from bitsandbytes' table."""
    return one.shape == other.shape and np.allclose(one, other, rtol=8e-7, atol=0)


def flattened(saved: StateDict) -> StateDict:
    """A state dict of bitsandbytes as releases before 0.49.2 wrote it."""
    state = {
        key: {
            **{field: value for field, value in entries.items() if field != NESTED},
            **entries.get(NESTED, {}),
        }
        for key, entries in saved["state"].items()
    }
    return {**saved, "state": state}


def nested(saved: StateDict) -> StateDict:
    """The same as releases from 0.49.2 on write it."""
    state = {}
    for key, entries in flattened(saved)["state"].items():
        inner = {field: value for field, value in entries.items() if field != "step"}
        state[key] = {"step": entries["step"], NESTED: inner}
    return {**saved, "state": state}
