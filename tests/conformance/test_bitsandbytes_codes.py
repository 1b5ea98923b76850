"""bitsandbytes' maps and quantizers: the generic one beside ours, the CPU wheel's as its model."""

from __future__ import annotations

import platform
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from optfactory import build_optimizer
from tests.conformance import bitsandbytes_oracles as bnb
from tests.conformance.harness import (
    STATES,
    Deviation,
    assert_parameter,
    feed,
    off_boundaries,
    pair,
    peer,
)
from tests.conftest import on_cpus
from tests.numerics.harness import DTYPES

COMPAT: dict[str, Any] = {"compat": "bitsandbytes"}


def test_the_maps_in_its_state_are_those_of_an_export() -> None:
    optim = peer("bitsandbytes").optim
    (ours,), (theirs,) = pairs = pair([(20, 300)])
    optimizer, other = build_optimizer("adamw8bit", [ours]), optim.AdamW8bit([theirs])
    feed(0, *pairs)
    optimizer.step()
    other.step()
    found = optimizer.export_state_dict("bitsandbytes")["state"][0]
    for number, values in bnb.MAPS.items():
        assert found[f"qmap{number}"].numpy().tobytes() == values.tobytes()
        # It computes its maps with torch.linspace, whose last bit depends on the processor.
        if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
            assert other.state[theirs][f"qmap{number}"].numpy().tobytes() == values.tobytes()


def test_the_table_on_cpus_does_not_reach_small_codes() -> None:
    """Among them the signed 0: why the wheel's codes are no oracle for ours."""
    missing = {n: set(range(256)) - set(bnb.table_of(v).tolist()) for n, v in bnb.MAPS.items()}
    assert missing == {1: set(range(124, 131)), 2: {1, 2, 3, 4, 5, 6, 8, 9, 11, 13}}


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="other builds contract the table's index"
)
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
@pytest.mark.parametrize(
    ("size", "dtype"),
    [(4096, "fp32"), (5000, "fp32"), (65573, "fp32"), (8192, "bf16"), (8192, "fp16")],
)
def test_the_table_gives_all_codes_of_the_cpu_wheel(
    size: int, dtype: str, weight_decay: float, deviation: Deviation
) -> None:
    """Every code and scale of both states, at every step, from the model's own state.

    The moments are computed with torch's operations as the wheel's are: only these round alike.
    """
    (mine,), (theirs,) = pairs = pair([(size,)], DTYPES[dtype])
    kind = peer("bitsandbytes").optim.Adam8bit
    other = kind([theirs], lr=1e-3, weight_decay=weight_decay)
    moments = [torch.zeros(size), torch.zeros(size)]
    for step in range(20):
        feed(step, *pairs)
        other.step()
        _step_of_the_wheel(mine, moments, step + 1, weight_decay)
        for number, moment in enumerate(moments, start=1):
            codes, scales = bnb.table_quantize(moment.numpy(), number)
            state = other.state[theirs]
            assert (state[f"state{number}"].numpy() == codes).all(), (step, number)
            assert (state[f"absmax{number}"].numpy() == scales).all(), (step, number)
            moment.copy_(torch.from_numpy(bnb.table_dequantize(codes, scales, number)))
        assert_parameter(mine, theirs, deviation)


@torch.no_grad()
def _step_of_the_wheel(p: Tensor, moments: list[Tensor], step: int, decay: float) -> None:
    """m, v and p in the order of the wheel's 8-bit operations."""
    m, v = moments
    assert p.grad is not None
    g, wide = p.grad.float(), p.detach().float()
    c1, c2 = 1 - 0.9**step, (1 - 0.999**step) ** 0.5
    m.mul_(0.9).add_(g, alpha=1 - 0.9)
    v.mul_(0.999).addcmul_(g, g, value=1 - 0.999)
    wide = wide * (1 - 1e-3 * decay)
    p.copy_(wide.addcdiv(m, (v.sqrt() / c2).add_(1e-8), value=-1e-3 / c1))


def _spread(shape: tuple[int, ...]) -> Tensor:
    """Numbers over twelve decades, one block of zeros; most rows start with a 1 or a -1."""
    rng = np.random.default_rng(0)
    g = (10 ** rng.uniform(-12, 0, shape) * rng.choice([-1, 1], shape)).astype(np.float32)
    g[::3, 0], g[1::3, 0] = -1.0, 1.0
    g.reshape(-1)[512:768] = 0
    return torch.from_numpy(g)


@pytest.mark.parametrize(
    ("shape", "asked"),
    [((60, 512), {}), ((60, 512), COMPAT), ((33, 300), COMPAT)],
    ids=["ours", "compat", "compat-flat"],
)
@on_cpus
def test_codes_are_those_of_the_generic_quantizer(
    shape: tuple[int, ...], asked: dict[str, Any], backend: str
) -> None:
    """With betas of 0 the moments are g and fl32(g^2). Ours are compared where the scale is theirs.

    That is where no negative element is a block's largest. A second moment above 0 takes code 1 at
    least; under `compat` blocks are those of the flattened tensor, and tiny negatives keep a sign.
    """
    g = _spread(shape)
    p = torch.zeros(shape, requires_grad=True)
    p.grad = g.clone()
    optimizer = build_optimizer("adam8bit", [p], betas=(0.0, 0.0), **asked)
    optimizer.step()
    for number, (name, x) in enumerate(zip(STATES, (g, g * g), strict=True), start=1):
        codes, scales = (t.numpy() for t in bnb.quantize(x, number))
        state = optimizer.state[p]
        equal = state[f"{name}_absmax"].reshape(-1).numpy() == scales
        assert equal.all() or not asked
        per_element = np.repeat(scales, 256)[: x.numel()].reshape(shape)
        same = np.repeat(equal, 256)[: x.numel()].reshape(shape) & (per_element > 1e-38)
        assert same.mean() > (0.4 if not asked and number == 1 else 0.95)
        y = x.numpy() / np.where(same, per_element, 1)
        clear = same & off_boundaries(y, bnb.CODECS[number])
        assert clear.sum() > 0.999 * same.sum()
        want = bnb.sign_fixed(codes, x.numpy(), number) if asked else codes
        if number == 2 and not asked:
            want = np.where((codes == 0) & (y > 0), 1, want)
        assert (state[f"{name}_q8"].numpy() == want)[clear].all()
