"""torchao's 8-bit Adam and AdamW: codes and scales of the same numbers, and whole steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from optfactory import build_optimizer
from tests.conformance.harness import (
    STATES,
    Array,
    Deviation,
    apart,
    distance,
    eager,
    feed,
    off_boundaries,
    pair,
    peer,
)
from tests.conftest import on_cpus
from tests.numerics.harness import array
from tests.reference import quantization as q
from tests.reference.tables import SIGNED, UNSIGNED

LR = 1e-3
STEPS = 20
MAPS = {"exp_avg": SIGNED, "exp_avg_sq": UNSIGNED}

# It keeps short rows and tensors that its blocks do not divide in 32 bits.
SHAPES = [(20, 512), (4096,), (16, 16, 4, 4)]

PEERS = {"adam8bit": ("Adam8bit", 0.0), "adamw8bit": ("AdamW8bit", 0.1)}
names = pytest.mark.parametrize("name", PEERS)


def _theirs(name: str, params: list[Tensor], **asked: Any) -> Any:
    return getattr(peer("torchao.optim"), PEERS[name][0])(params, lr=LR, **asked)


def _step(optimizer: Any) -> None:
    with eager():
        optimizer.step()


def test_its_maps_are_the_same_bytes() -> None:
    (theirs,) = pair([(20, 512)])[1]
    other = _theirs("adam8bit", [theirs])
    feed(0, [theirs])
    _step(other)
    # It computes its maps with torch.linspace, whose last bit depends on the processor.
    exact = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    for name, values in MAPS.items():
        qmap = other.state[theirs][name].qmap.numpy()
        np.testing.assert_array_max_ulp(qmap, values, maxulp=0 if exact else 2)


@pytest.mark.parametrize("asked", [{}, {"compat": "bitsandbytes"}], ids=["ours", "compat"])
@on_cpus
def test_codes_and_scales_of_the_same_numbers(asked: dict[str, Any], backend: str) -> None:
    """With betas of 0 the moments are g and fl32(g^2), to the bit on both sides."""
    ours, theirs = pair([(60, 512)])
    optimizer = build_optimizer("adam8bit", ours, betas=(0.0, 0.0), **asked)
    other = _theirs("adam8bit", theirs, betas=(0.0, 0.0))
    feed(3, ours, theirs)
    g = array(ours[0].grad)
    optimizer.step()
    _step(other)
    for name, x in zip(STATES, (g, np.square(g).astype(np.float32).astype(float)), strict=True):
        their, state = other.state[theirs[0]][name], optimizer.state[ours[0]]
        codes, scales = their.codes.numpy(), their.scale.numpy()
        equal = state[f"{name}_absmax"].reshape(-1).numpy() == scales
        # Ours has a larger scale for blocks whose largest number is negative, and both have
        # their own for blocks of zeros.
        assert equal.mean() > (0.9 if asked or name == "exp_avg_sq" else 0.4)
        clear = _comparable(x, equal, scales, name)
        want = _as_ours(codes, x, name, asked)
        assert (state[f"{name}_q8"].numpy() == want)[clear].all()


def _comparable(x: Array, equal: Array, scales: Array, name: str) -> Array:
    """Elements of blocks with equal scales that lie on no boundary between two codes."""
    inside = equal.repeat(256).reshape(x.shape)
    codec = q.SIGNED_CODEC if name == "exp_avg" else q.UNFLOORED_CODEC
    clear: Array = inside & off_boundaries(x / scales.repeat(256).reshape(x.shape), codec)
    assert clear.sum() > 0.999 * inside.sum()
    return clear


def _as_ours(codes: Array, x: Array, name: str, asked: dict[str, Any]) -> Array:
    """torchao's codes with the floor of our second moments, or with the sign fix of `compat`."""
    if asked:
        return np.where((name == "exp_avg") & (codes == 127) & (x < 0), 126, codes)
    return np.where((name == "exp_avg_sq") & (codes == 0) & (x > 0), 1, codes)


@names
@on_cpus
def test_steps_from_the_same_state(name: str, backend: str, deviation: Deviation) -> None:
    """Codes, scales and parameters are copied from torchao before each step.

    It computes 1 - beta2^t from a float32 beta2, which makes it 1.3e-5 smaller, its root half that.
    """
    pairs = pair(SHAPES)
    decay = PEERS[name][1]
    ours = build_optimizer(name, pairs[0], lr=LR, weight_decay=decay)
    other = _theirs(name, pairs[1], weight_decay=decay)
    ours.init_states()
    for step in range(STEPS):
        feed(step, *pairs)
        before = [their.detach().clone() for their in pairs[1]]
        ours.step()
        _step(other)
        for p, their, start in zip(*pairs, before, strict=True):
            longest = distance(their, start)  # many learning rates where it has no floor
            deviation("p, relative", apart(p, their, longest), 1e-5)
            for key in STATES:
                _compare(ours.state[p], other.state[their][key], key, deviation)
                _copy(ours.state[p], other.state[their][key], key)
            with torch.no_grad():
                p.copy_(their)


def _compare(state: dict[str, Tensor], their: Any, key: str, deviation: Deviation) -> None:
    """Scales up to 1 / 0.993 of theirs; the same where no negative number decides, as the codes."""
    got, scales = state[f"{key}_absmax"].reshape(-1), their.scale
    nonzero = scales > 1e-12
    factor = (got / scales)[nonzero]
    deviation("scales, by theirs", float(factor.max()), (1 + 3e-7) / 0.99296874)
    assert factor.min() > 1 - 3e-7
    codes, wanted = state[f"{key}_q8"].reshape(-1, 256).int(), their.codes.reshape(-1, 256).int()
    live = nonzero & (wanted == 255).any(dim=1)  # a largest number that is positive
    if key == "exp_avg":
        live &= ~(wanted == 0).any(dim=1)
    assert live.float().mean() > 0.2
    deviation("scales, relative", apart(got[live], scales[live], 0.0), 3e-7)
    off = (codes - wanted)[live]
    if key == "exp_avg_sq":
        off[(codes[live] == 1) & (wanted[live] == 0)] = 0  # our floor
    deviation("codes apart", float(off.abs().max()), 1)
    deviation("codes, share that differs", float((off != 0).float().mean()), 1e-3)


def _copy(state: dict[str, Tensor], their: Any, key: str) -> None:
    state[f"{key}_q8"].copy_(their.codes)
    state[f"{key}_absmax"].copy_(their.scale.view_as(state[f"{key}_absmax"]))


@names
@on_cpus
def test_trajectories_of_steady_gradients_stay_together(
    name: str, backend: str, deviation: Deviation
) -> None:
    """Free-running, and both as far from 32 bits.

    With gradients of any size torchao takes giant steps, which our second moment's floor prevents.
    """
    sides = [pair(SHAPES[:2])[0] for _ in range(3)]
    decay = PEERS[name][1]
    optimizers = [
        build_optimizer(name, sides[0], lr=LR, weight_decay=decay),
        _theirs(name, sides[1], weight_decay=decay),
        build_optimizer(name.replace("8bit", "32bit"), sides[2], lr=LR, weight_decay=decay),
    ]
    for step in range(30):
        feed(step, *sides)
        for p, *others in zip(*sides, strict=True):
            p.grad = p.grad.sign() + 0.5 * p.grad.clamp(-1, 1)
            for other in others:
                other.grad = p.grad.clone()
        for optimizer in optimizers:
            _step(optimizer)
    for ours, theirs, exact in zip(*sides, strict=True):
        error, other = (float((p - exact).detach().norm()) for p in (ours, theirs))
        deviation("error, by torchao's", error / other, 1.1)
        path = 30 * LR * ours.numel() ** 0.5
        deviation("distance, by the path", float((ours - theirs).detach().norm()) / path, 0.01)
