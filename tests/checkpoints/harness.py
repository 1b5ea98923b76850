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
from tests.reference import quantization as oracle

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


def encoded(values: Array, name: str, flat: bool = False, block: int = 256) -> tuple[Array, Array]:
    """Codes and scales that the specification gives; flat: in blocks of the flattened tensor."""
    shape = values.shape
    codes, scales = oracle.encode(values.reshape(-1) if flat else values, CODECS[name], None, block)
    return codes.reshape(shape), scales


def decoded(codes: Array, scales: Array, name: str, flat: bool = False, block: int = 256) -> Array:
    """Float32 values of codes."""
    elements = codes.reshape(-1) if flat else codes
    values = oracle.decode32(elements, scales, CODECS[name], block)
    return values.reshape(codes.shape)


def values_of(entries: dict[str, Tensor], name: str, block: int = 256) -> Array:
    """The values of one of our states, 8- or 32-bit."""
    if name in entries:
        return array(entries[name])
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
