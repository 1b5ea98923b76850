"""Damaged checkpoints of every layout are refused without a trace, or load and train safely."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from optfactory import Optimizer2State, build_optimizer
from optfactory.errors import StateError
from tests.checkpoints.harness import StateDict, flattened, nested
from tests.robustness.harness import OPTIONS, Cut, Shape, examples, raw
from tests.robustness.mutations import at, damage, tensors
from tests.torch_api.harness import held, snapshot, train

# Two of one shape, whose states fit each other; one that stays at 32 bits.
SHAPES: list[Shape] = [(3, 300), (3, 300), (260,), (2, 3)]

KINDS: dict[str, tuple[str, torch.dtype, dict[str, Any]]] = {
    "adamw8bit": ("adamw8bit", torch.float32, {}),
    "paged_lamb8bit": ("paged_lamb8bit", torch.float32, {"trust_ratio": "clip"}),
    "adamw": ("adamw", torch.bfloat16, {"weight_decay": 0.0}),
    "amsgrad": ("adam32bit", torch.float32, {"amsgrad": True}),
    **{option: ("adamw", *OPTIONS[option]) for option in OPTIONS},
    "compat": ("adamw8bit", torch.float32, {"compat": "bitsandbytes"}),
}


def _cut(shape: Shape, dtype: torch.dtype) -> Cut:
    """Ones in guarded memory."""
    none, ones = (0,) * len(shape), (1,) * len(shape)
    return Cut(torch.ones(shape, dtype=dtype), tuple(range(len(shape))), ones, none, none, 3)


def _optimizer(kind: str, steps: int) -> tuple[Optimizer2State, list[Cut]]:
    name, dtype, asked = KINDS[kind]
    bits = {"min_8bit_size": 64} if name.endswith("8bit") else {}
    cuts = [_cut(shape, dtype) for shape in SHAPES]
    named = [(f"w{index}", nn.Parameter(cut.view)) for index, cut in enumerate(cuts)]
    optimizer = build_optimizer(name, named, **bits, **asked)
    train(optimizer, range(steps))
    return optimizer, cuts


# ---- whole checkpoints -----------------------------------------------------------------------


def _ours(kind: str) -> StateDict:
    return _optimizer(kind, 2)[0].state_dict()


def _torch(**asked: Any) -> StateDict:
    optimizer = torch.optim.AdamW([torch.ones(shape).requires_grad_() for shape in SHAPES], **asked)
    train(optimizer, range(2))
    return optimizer.state_dict()


def _bitsandbytes(kind: str) -> StateDict:
    return flattened(_optimizer(kind, 2)[0].export_state_dict("bitsandbytes"))


def _tensor_wise(saved: StateDict) -> StateDict:
    """As releases with `block_wise=False` wrote it."""
    for entries in saved["state"].values():
        for number in (1, 2):
            if f"absmax{number}" in entries:
                entries[f"max{number}"] = entries.pop(f"absmax{number}")[:1]
                entries[f"new_max{number}"] = torch.zeros(1)
    return saved


# Each with an optimizer that loads it.
SOURCES: dict[str, tuple[Callable[[], StateDict], str]] = {
    **{kind: (lambda kind=kind: _ours(kind), kind) for kind in KINDS},
    "torch": (_torch, "adamw8bit"),
    "torch, amsgrad": (lambda: _torch(amsgrad=True, weight_decay=0.0), "amsgrad"),
    "bitsandbytes": (lambda: _bitsandbytes("adamw8bit"), "adamw8bit"),
    "bitsandbytes, nested": (lambda: nested(_bitsandbytes("adamw8bit")), "stochastic"),
    "bitsandbytes, 32 bits": (lambda: nested(_bitsandbytes("adamw")), "adamw"),
    "bitsandbytes, LAMB": (lambda: _bitsandbytes("paged_lamb8bit"), "paged_lamb8bit"),
    "bitsandbytes, one scale": (
        lambda: _tensor_wise(_bitsandbytes("adamw8bit")),
        "one scale, clipped",
    ),
}


@cache
def checkpoint(source: str) -> StateDict:
    return SOURCES[source][0]()


# ---- damaged ones ----------------------------------------------------------------------------


def _plain_tensors(saved: StateDict) -> list[tuple[Tensor, bytes]]:
    """The tensors of a checkpoint whose bytes can be read."""
    found = [at(saved, path) for path in tensors(saved)]
    plain = [
        t.detach()
        for t in found
        if t.layout == torch.strided and t.device.type == "cpu" and not t.is_inference()
    ]
    return [(t, raw(t.resolve_neg().resolve_conj())) for t in plain]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _scales(state: dict[str, Tensor]) -> list[Tensor]:
    return [tensor for key, tensor in state.items() if str(key).endswith("absmax")]


def assert_trains_safely(
    optimizer: Optimizer2State, cuts: list[Cut], saved: list[tuple[Tensor, bytes]]
) -> None:
    """A step changes what is the optimizer's alone, which is whole enough to be loaded again."""
    entries = [optimizer.state.get(p, {}) for p in held(optimizer)]
    values = [value for entry in entries for value in entry.values()]  # foreign ones included
    states = [t for t in values if isinstance(t, Tensor) and t.layout == torch.strided]
    addresses = [_memory(t) for t in states]
    assert len(set(addresses)) == len(addresses), "two states share memory"
    scales = [t for p in held(optimizer) for t in _scales(optimizer.state.get(p, {}))]
    assert all(bool((t.isfinite() & (t >= 0)).all()) for t in scales), "no scales of a block"
    assert not {_memory(t) for t, _ in saved} & set(addresses), "a state is the checkpoint's"
    train(optimizer, range(2, 4))
    for cut in cuts:
        cut.assert_untouched_around("a parameter")
    for tensor, before in saved:
        assert raw(tensor.resolve_neg().resolve_conj()) == before, "the checkpoint was written"
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("source", SOURCES)
@given(data=st.data(), steps=st.integers(0, 1))
@examples(25)
def test_a_damaged_checkpoint_is_refused_or_safe(
    source: str, data: st.DataObject, steps: int
) -> None:
    saved = copy.deepcopy(checkpoint(source))
    damage(data.draw, saved)
    natural = SOURCES[source][1]
    optimizer, cuts = _optimizer(data.draw(st.sampled_from([*KINDS] + 20 * [natural])), steps)
    before, kept = snapshot(optimizer), _plain_tensors(saved)
    try:
        optimizer.load_state_dict(saved)
    except StateError:
        assert snapshot(optimizer) == before
        train(optimizer, range(1, 2))
        return
    assert_trains_safely(optimizer, cuts, kept)


@pytest.mark.parametrize("source", SOURCES)
def test_whole_checkpoints_load(source: str) -> None:
    saved = copy.deepcopy(checkpoint(source))
    optimizer, cuts = _optimizer(SOURCES[source][1], 0)
    kept = _plain_tensors(saved)
    optimizer.load_state_dict(saved)
    assert_trains_safely(optimizer, cuts, kept)
    assert all(int(optimizer.state[p]["step"]) == 4 for p in held(optimizer))
