"""bitsandbytes' optimizers step by step: its CPU wheel's, and those of its generic operators."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from optfactory import build_optimizer
from tests.conformance import bitsandbytes_oracles as bnb
from tests.conformance.harness import (
    STATES,
    Array,
    Deviation,
    apart,
    assert_parameter,
    distance,
    feed,
    off_boundaries,
    pair,
    peer,
)
from tests.conftest import on_cpus
from tests.numerics.harness import DTYPES, array

COMPAT: dict[str, Any] = {"compat": "bitsandbytes"}
STEPS = 12

Pairs = tuple[list[Tensor], list[Tensor]]

# By name: the package's class, what makes the two one algorithm, and the weight decay for both.
# Under `compat` decay follows the step, as on GPUs, and not on CPUs: there it is 0.
EIGHT_BITS = {
    "adam8bit": ("Adam8bit", COMPAT, 0.0),
    "adamw8bit": ("AdamW8bit", COMPAT, 0.0),
    "lamb8bit": ("LAMB8bit", COMPAT | {"trust_ratio": "clip", "eps": 1e-8}, 0.0),
    "paged_adamw8bit": ("AdamW8bit", {}, 0.01),
}
eight_bits = pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, "fp32") for name in EIGHT_BITS), ("adam8bit", "fp16"), ("paged_adamw8bit", "bf16")],
)


def _goes_on(ours: Any, theirs: Any, pairs: Pairs) -> None:
    """Give our side the peer's checkpoint and its parameters."""
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        for p, their in zip(*pairs, strict=True):
            p.copy_(their)


# ---- 32 bits --------------------------------------------------------------------------------


def _wheel(params: list[Tensor], **asked: Any) -> Any:
    return peer("bitsandbytes").optim.AdamW32bit(params, **asked)


@pytest.mark.parametrize(
    ("decay", "asked", "dtype"),
    [(0.1, {}, "fp32"), (0.0, COMPAT, "fp32"), (0.1, {}, "bf16"), (0.0, COMPAT, "fp16")],
    ids=["decay", "compat", "decay-bf16", "compat-fp16"],
)
@pytest.mark.parametrize("theirs", [_wheel, bnb.Generic], ids=["wheel", "generic"])
@on_cpus
def test_adamw_at_32_bits(
    theirs: Any,
    decay: float,
    asked: dict[str, Any],
    dtype: str,
    backend: str,
    deviation: Deviation,
) -> None:
    """Free-running in float32. 16-bit parameters start each step from the package's."""
    pairs = pair([(20, 300), (257,)], DTYPES[dtype])
    ours = build_optimizer("adamw32bit", pairs[0], lr=1e-2, weight_decay=decay, **asked)
    other = theirs(pairs[1], lr=1e-2, weight_decay=decay)
    for step in range(60):
        feed(step, *pairs)
        ours.step()
        other.step()
        for p, their in zip(*pairs, strict=True):
            if dtype == "fp32":
                deviation("p, relative", apart(p, their, 60 * 1e-2), 1e-6)
            else:
                assert_parameter(p, their, deviation)
                with torch.no_grad():
                    p.copy_(their)
    for p, their in zip(*pairs, strict=True):
        for number, name in enumerate(STATES, start=1):
            want = other.state[their][f"state{number}"]
            near = apart(ours.state[p][name], want, float(want.abs().max()))
            deviation("state, relative", near, 1e-6)


@pytest.mark.parametrize("max_unorm", [1.0, 0.02])
@pytest.mark.parametrize(("decay", "asked"), [(0.1, {}), (0.0, COMPAT)], ids=["decay", "compat"])
@on_cpus
def test_lamb_at_32_bits_is_the_generic_one(
    decay: float, asked: dict[str, Any], max_unorm: float, backend: str, deviation: Deviation
) -> None:
    """Its ratio of bias-corrected norms; `compat` freezes a tensor of zeros as it does.

    The CPU wheel's own LAMB leaves the bias in the norm, and is no oracle.
    """
    pairs = pair([(20, 300), (257,), (33, 300)])
    for side in pairs:
        with torch.no_grad():
            side[1].mul_(100)  # no clipping
            side[2].mul_(0.0 if "compat" in asked else 1e-2)
    shared = {"lr": 1e-2, "eps": 1e-8, "weight_decay": decay, "max_unorm": max_unorm}
    ours = build_optimizer("lamb32bit", pairs[0], trust_ratio="clip", **shared, **asked)
    other = bnb.Generic(pairs[1], "lamb", **shared)
    starts = [p.detach().clone() for p in pairs[0]]
    for step in range(30):
        feed(step, *pairs)
        ours.step()
        other.step()
    for p, their, start in zip(*pairs, starts, strict=True):
        path = max(30 * 1e-2 * max_unorm, distance(p, start))
        deviation("p, relative", apart(p, their, path), 1e-6)
    assert (distance(pairs[0][2], starts[2]) == 0) == ("compat" in asked)


# ---- 8 bits ---------------------------------------------------------------------------------


def _beside(name: str, dtype: str, theirs: Any) -> Any:
    """Both optimizers; LAMB without the small tensor, whose 32-bit state has a ratio."""
    _, asked, decay = EIGHT_BITS[name]
    shapes = [(20, 512), (4097,)] + ([] if "lamb" in name else [(255,)])
    pairs = pair(shapes, DTYPES[dtype])
    ours = build_optimizer(name, pairs[0], lr=1e-3, weight_decay=decay, **asked)
    return pairs, ours, theirs(pairs[1], lr=1e-3, weight_decay=decay)


@eight_bits
@on_cpus
def test_8_bits_are_those_of_the_generic_parts(
    name: str, dtype: str, backend: str, deviation: Deviation
) -> None:
    """From the same state each step: parameters, scales and all codes off the boundaries.

    Without a floor of the second moment some steps are so long that p cancels: by two units. Values
    that are computed differ from the peer's in last bits, which such a step makes into more.
    """
    units = 2 if "compat" in EIGHT_BITS[name][1] else 8

    def theirs(params: list[Tensor], **asked: Any) -> Any:
        return bnb.Generic(params, "lamb" if "lamb" in name else "adam", bits=8, **asked)

    pairs, ours, other = _beside(name, dtype, theirs)
    compared = clear_ones = 0
    for step in range(STEPS):
        _goes_on(ours, other, pairs)
        feed(step, *pairs)
        ours.step()
        other.step()
        for p, their in zip(*pairs, strict=True):
            assert_parameter(p, their, deviation, units)
            for number, key in enumerate(STATES, start=1):
                if "absmax1" in other.state[their] and "compat" in EIGHT_BITS[name][1]:
                    clear = _clear_codes(ours.state[p], other, their, number, key, deviation)
                    compared, clear_ones = compared + clear.size, clear_ones + clear.sum()
    assert clear_ones >= 0.99 * compared


def _clear_codes(
    state: Any, other: bnb.Generic, their: Tensor, number: int, key: str, deviation: Deviation
) -> Array:
    """Which codes the rounding of the moments cannot decide; these are equal."""
    entries, x = other.state[their], other.moments[their][number - 1].numpy()
    scales = entries[f"absmax{number}"].numpy()
    got = state[f"{key}_absmax"].numpy()
    live = scales > 1e-38
    deviation("scales, relative", (np.abs(got - scales)[live] / scales[live]).max(), 3e-7)
    assert (got[~live] == 0).all()
    per_element = np.repeat(scales, 256)[: x.size].reshape(x.shape)
    inside = per_element > 1e-38
    unit, g = np.where(inside, per_element, 1), array(their.grad)
    error = 2.0**-22 * (np.abs(x) + (0.2 * np.abs(g) if number == 1 else 2 * x)) / unit
    clear = off_boundaries(x / unit, bnb.CODECS[number], error)
    clear &= inside & ((number == 2) | (np.abs(x) / unit > error))
    want = bnb.sign_fixed(entries[f"state{number}"].numpy(), x, number)
    assert (state[f"{key}_q8"].numpy() == want)[clear].all()
    return clear[inside]


@pytest.mark.parametrize("max_unorm", [1.0, 0.02])
@on_cpus
def test_lamb_with_its_ratio_at_8_bits(
    max_unorm: float, backend: str, deviation: Deviation
) -> None:
    """What the package refuses, LAMB8bit with max_unorm, from its own parts."""
    pairs = pair([(20, 512), (4097,)])
    shared = {"lr": 1e-3, "eps": 1e-8, "weight_decay": 0.1, "max_unorm": max_unorm}
    ours = build_optimizer("lamb8bit", pairs[0], trust_ratio="clip", **shared)
    other = bnb.Generic(pairs[1], "lamb", bits=8, **shared)
    for step in range(STEPS):
        _goes_on(ours, other, pairs)
        feed(step, *pairs)
        ours.step()
        other.step()
        norm = float(pairs[1][0].detach().norm())
        assert float(other.state[pairs[1][0]]["unorm_vec"]) ** 0.5 > max_unorm * norm
        for p, their in zip(*pairs, strict=True):
            assert_parameter(p, their, deviation)


@eight_bits
@on_cpus
def test_8_bits_go_on_from_checkpoints_of_the_cpu_wheel(
    name: str, dtype: str, backend: str, deviation: Deviation
) -> None:
    """Before each step ours loads the wheel's state, which gives the same parameters and scales.

    Codes are the same for 97 % of what is above 1e-3 of a scale. Others are one off, where the
    wheel's table leads over a boundary, and more where its steps are wider than the map's cells.
    The portable backend rounds products on their own.
    """
    kind = getattr(peer("bitsandbytes").optim, EIGHT_BITS[name][0])
    pairs, ours, other = _beside(name, dtype, kind)
    tolerance = 2.4e-7 if backend == "reference" else 0.0
    for step in range(STEPS):
        if step:
            _goes_on(ours, other, pairs)
        feed(step, *pairs)
        ours.step()
        other.step()
        for p, their in zip(*pairs, strict=True):
            assert_parameter(p, their, deviation)
            for number, key in enumerate(STATES, start=1):
                if "absmax1" in other.state[their] and "compat" in EIGHT_BITS[name][1]:
                    mine, its = ours.state[p], other.state[their]
                    _assert_near_codes(mine, its, number, key, tolerance, deviation)


def _assert_near_codes(
    state: Any,
    entries: dict[str, Any],
    number: int,
    key: str,
    tolerance: float,
    deviation: Deviation,
) -> None:
    """Scales are the wheel's, and codes that are not of blocks of zeros are near the wheel's."""
    scales, got = entries[f"absmax{number}"], state[f"{key}_absmax"]
    deviation("scales, relative", apart(got, scales, 1e-38), tolerance)
    codes, theirs = (t.int().reshape(-1) for t in (state[f"{key}_q8"], entries[f"state{number}"]))
    live = (scales > 0).repeat_interleave(256)[: codes.numel()]
    off = (codes - theirs).abs()[live].numpy()
    small = np.abs(bnb.MAPS[number][theirs[live].numpy()]) < 1e-3
    deviation(f"small codes of {key} apart", off[small].max(initial=0), 7 if number == 2 else 4)
    deviation(f"other codes of {key} apart", off[~small].max(), 1)
    deviation(f"other codes of {key}, share that differs", (off[~small] > 0).mean(), 0.03)
