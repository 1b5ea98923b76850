"""compat: bitsandbytes: what its CUDA kernels do where they differ from this library."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from optfactory import build_optimizer
from tests.families import ELEMENT_WISE, families_with, known_to, states_of
from tests.numerics.harness import DTYPES, Twin, array, gradient, parameters, quantized
from tests.options.tools import (
    SHAPES,
    SMALL,
    assert_refused,
    assert_resumes,
    element_wise,
    families,
    train,
    trained,
    widths,
)
from tests.reference import quantization as q

COMPAT: dict[str, Any] = {"compat": "bitsandbytes"}
# What a family needs beside it, and with decay, if it has such a field.
NEEDED: dict[str, Any] = {"trust_ratio": "clip"}
DECAYING: dict[str, Any] = {"weight_decay": 0.1, "adam_w_mode": True}
dtypes = pytest.mark.parametrize("dtype", DTYPES)


def _asked(family: str, decays: bool = False) -> dict[str, Any]:
    return COMPAT | known_to(family, NEEDED | DECAYING if decays else NEEDED)


@dtypes
@widths
@element_wise
def test_follows_the_reference(family: str, width: int, dtype: str, backend: str) -> None:
    asked = _asked(family, decays=True) | {"optim_bits": width, "lr": 0.01}
    twin = Twin(family, parameters(DTYPES[dtype], SHAPES), **asked)
    for step in range(4):
        twin.step(step)
    if width == 8:
        twin.count.check()


@dtypes
@element_wise
def test_tensor_wise_state_follows_the_reference(family: str, dtype: str, backend: str) -> None:
    """The case in which bitsandbytes' LAMB had a ratio at 8 bits."""
    asked = _asked(family, decays=True) | {"optim_bits": 8, "block_wise": False, "lr": 0.01}
    twin = Twin(family, parameters(DTYPES[dtype], [(20, 300), (4097,)]), **asked)
    for step in range(4):
        twin.step(step)


@widths
@element_wise
def test_without_decay_and_with_clipping(family: str, width: int, backend: str) -> None:
    asked = _asked(family) | {"optim_bits": width, "percentile_clipping": 20}
    twin = Twin(family, parameters(torch.float32, SMALL), **asked)
    for step in range(4):
        twin.step(step)


def test_codes_scales_and_signs_to_the_bit(backend: str) -> None:
    """Flat blocks, max |x| as scale, tiny negatives as 126, blocks of +0 as 255, no floor."""
    rng = np.random.default_rng(0)
    shape = (30, 300)
    g = (10 ** rng.uniform(-12, 0, shape) * rng.choice([-1, 1], shape)).astype(np.float32)
    g.reshape(-1)[512:1024] = 0
    g.reshape(-1)[2048:2304] = -np.abs(g.reshape(-1)[2048:2304])
    p = torch.zeros(shape, requires_grad=True)
    p.grad = torch.from_numpy(g.copy())
    optimizer = build_optimizer("adam", [p], betas=(0.0, 0.0), optim_bits=8, **COMPAT)
    optimizer.step()
    moments = (
        ("exp_avg", g, q.COMPAT_SIGNED_CODEC),
        ("exp_avg_sq", g * g, q.COMPAT_UNSIGNED_CODEC),
    )
    for name, moment, rule in moments:
        codes, scales = q.encode(moment.reshape(-1), rule)
        got = quantized(optimizer.state[p], name)
        assert got.scales.shape == (36,)
        assert (got.scales == scales).all()
        assert int((got.codes.reshape(-1) != codes).sum()) == 0
    codes = optimizer.state[p]["exp_avg_q8"].reshape(-1)
    assert (codes[512:1024] == 255).all()
    assert {126, 127} <= set(codes.tolist())


def test_a_negative_extreme_shrinks(backend: str) -> None:
    """max |x| as scale stores it as -0.993 of itself, step after step; the default does not."""
    for asked, want in ((COMPAT, -0.93387), ({}, -1.0)):
        p = torch.zeros(20, 256, requires_grad=True)
        optimizer = build_optimizer("adam8bit", [p], **asked)
        for _ in range(200):
            p.grad = torch.full_like(p, -1.0)
            optimizer.step()
        state = quantized(optimizer.state[p], "exp_avg")
        m = q.decode32(state.codes.reshape(-1), state.scales.reshape(-1), q.SIGNED_CODEC)
        np.testing.assert_allclose(m, want, rtol=1e-4)


@dtypes
def test_decay_follows_the_step_with_a_rounding_of_its_own(dtype: str, backend: str) -> None:
    """In 16 bits T(T(p - step) * factor) differs from T(p * factor - step) in many elements."""
    asked = {"weight_decay": 0.1, "lr": 0.05}
    kind, shapes = DTYPES[dtype], [(20, 300)]
    one, other = (
        trained("adamw", kind, shapes, steps=1, **asked, **extra) for extra in ({}, COMPAT)
    )
    assert one["p0"] != other["p0"]
    assert {key for key in one if one[key] != other[key]} == {"p0"}


def _kept_decay(**extra: Any) -> float:
    """The share of a decay of lr * weight_decay = 1e-4 a step that bfloat16 parameters follow."""
    ends, steps = [], 30
    for decay in (0.0, 0.1):
        generator = torch.Generator().manual_seed(0)
        p = 0.04 + 0.02 * torch.rand(20_000, generator=generator)
        p = p.to(torch.bfloat16).requires_grad_()
        asked = {"lr": 1e-3, "weight_decay": decay, "betas": (0.0, 0.9), **extra}
        optimizer = build_optimizer("adamw", [p], **asked)
        for _ in range(steps):
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            optimizer.step()
        ends.append(float(array(p).mean()))
    return (ends[0] - ends[1]) / (steps * 1e-4 * 0.05)


def test_decay_in_bfloat16_is_lost(backend: str) -> None:
    """A rounding of its own swallows it; the steps' random sizes dither the one of the default."""
    assert 0.7 < _kept_decay() < 1.3
    assert abs(_kept_decay(**COMPAT)) < 0.3


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@element_wise
def test_blocks_forget_an_element_that_is_not_finite(family: str, bad: float, backend: str) -> None:
    (p,) = parameters(torch.float32, [(20, 300)])
    twin = Twin(family, [p], **_asked(family, decays=True), optim_bits=8)
    twin.step(0)
    before = p.detach().clone()
    g = gradient((20, 300), torch.float32, 1)
    g[3, 5] = g[7, 299] = bad
    twin.step(1, [g])
    assert torch.equal(p[3, 5], before[3, 5])
    assert torch.equal(p[7, 299], before[7, 299])
    assert torch.isfinite(p).all()
    state = twin.optimizer.state[p]
    for kept in states_of(family):
        assert state[f"{kept.name}_q8"][3, 5] == (127 if kept.signed else 0)
    twin.step(2)


@element_wise
def test_32_bits_protect_nothing(family: str, backend: str) -> None:
    (p,) = parameters(torch.float32, [(20, 300)])
    twin = Twin(family, [p], **_asked(family), optim_bits=32)
    g = gradient((20, 300), torch.float32, 1)
    g[3, 5] = float("nan")
    twin.step(0, [g])
    assert torch.isnan(p[3, 5])


@widths
def test_lamb_freezes_a_tensor_of_zeros(width: int, backend: str) -> None:
    for asked in ({"optim_bits": 32}, {"optim_bits": 8, "block_wise": False}):
        p = torch.zeros(20, 300, requires_grad=True)
        twin = Twin("lamb", [p], **_asked("lamb"), **asked, lr=1e-2)
        for step in range(3):
            twin.step(step)
        assert not p.any()


def test_lamb_has_no_ratio_for_blocks_of_8_bits(backend: str) -> None:
    """It takes AdamW's steps, also from zeros."""
    runs = []
    for family in ("lamb", "adamw"):
        params = [torch.zeros(20, 300), *(p.detach() for p in parameters(torch.float32, SMALL[:1]))]
        params = [p.requires_grad_() for p in params]
        asked = _asked(family, decays=True) | {"eps": 1e-6, "lr": 1e-2}
        optimizer = build_optimizer(f"{family}8bit", params, **asked)
        train(optimizer, range(3))
        runs.append(params)
    assert runs[0][0].any()
    for one, other in zip(*runs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_lamb_keeps_the_ratio_of_32_bit_state_in_an_8_bit_optimizer(backend: str) -> None:
    """Tensors too small for 8 bits run through bitsandbytes' 32-bit kernel."""
    p = torch.full((40, 50), 1e-3, requires_grad=True)
    twin = Twin("lamb", [p], optim_bits=8, **_asked("lamb"), lr=1e-2)
    (update,) = twin.step(0)
    assert update.ratio < 0.01


@element_wise
def test_none_is_the_default(family: str, backend: str) -> None:
    for width in (32, 8):
        default = trained(family, optim_bits=width)
        assert trained(family, optim_bits=width, compat="none") == default
        assert trained(family, optim_bits=width, **_asked(family)) != default or width == 32


@widths
@element_wise
def test_resumes_bit_for_bit(family: str, width: int, backend: str) -> None:
    assert_resumes(family, optim_bits=width, **_asked(family, decays=True))


REFUSED: list[dict[str, Any]] = [
    {"optim_bits": 8, "signed_map": "symmetric"},
    {"optim_bits": 8, "second_moment_floor": False},
    {"skip_zeros": True},
    {"nonfinite": "skip_element"},
    {"nonfinite": "skip_step"},
    {"param_rounding": "kahan"},
    {"param_rounding": "stochastic"},
]


@pytest.mark.parametrize(
    ("family", "other"),
    [
        pytest.param(family, other, id=f"{family}-{other}")
        for family in ELEMENT_WISE
        for other in REFUSED
        if known_to(family, other) == other
    ],
)
def test_refused_beside_options_it_decides(family: str, other: dict[str, Any]) -> None:
    field = list(other)[-1]
    params = [torch.zeros(8, dtype=torch.bfloat16).requires_grad_()]
    assert_refused(f"compat.*{field}", family, params, **_asked(family), **other)


@families
def test_refused_values(family: str) -> None:
    assert_refused("compat", family, compat="torch")


@pytest.mark.parametrize("family", families_with("adam_w_mode", "bias_correction"))
def test_refused_algorithms(family: str) -> None:
    l2 = {"adam_w_mode": False, "weight_decay": 0.1}
    assert_refused("adam_w_mode", family, **_asked(family) | l2)
    assert_refused("bias_correction", family, **_asked(family), bias_correction=False)


def test_lamb_must_say_clip() -> None:
    assert_refused("trust_ratio", "lamb", **COMPAT)
    assert_refused("trust_ratio", "lamb8bit", **COMPAT, trust_ratio="lamb")
