"""The float64 references themselves: against torch in float64, closed forms and float32."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.reference import REFERENCES, lamb
from tests.reference.base import ADAMS_MAXIMUM, ADAMS_MOMENTS, Options, State
from tests.reference.tracked import Tracked, spacing

ROOT = Path(__file__).parents[1] / "reference"


def _random(shape: tuple[int, ...], seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal(shape) * 10 ** rng.uniform(-3, 0, shape)


def test_references_never_import_the_package() -> None:
    for path in ROOT.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            roots = {name.partition(".")[0] for name in names}
            assert not roots & {"optfactory", "torch"}, path


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("family", ["adam", "adamw"])
def test_adam_is_torch_in_float64(family: str, decay: float, amsgrad: bool) -> None:
    o = replace(REFERENCES[family].defaults, weight_decay=decay, amsgrad=amsgrad, lr=0.01)
    peer = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[family]
    p, state = _random((50,), 0), State.zeros((50,), [*ADAMS_MOMENTS, ADAMS_MAXIMUM])
    q = torch.tensor(p, requires_grad=True)
    optimizer = peer([q], lr=0.01, weight_decay=decay, amsgrad=amsgrad)
    for step in range(30):
        g = _random((50,), step + 1) * (0.1 if step > 10 else 1)
        q.grad = torch.tensor(g)
        optimizer.step()
        update = REFERENCES[family].step(p, g, state, o)
        p, state = update.p.value, update.state()
    np.testing.assert_allclose(p, q.detach().numpy(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("scale", [0.01, 10.0])
def test_first_step_of_lamb_in_closed_form(scale: float) -> None:
    """At t = 1 the corrected moments are g and g^2, so that r = sign(g) for eps = 0."""
    p, g = scale * _random((40,), 0), _random((40,), 1)
    o = Options(eps=0.0, lr=0.1, weight_decay=0.3, adam_w_mode=True)
    length = np.linalg.norm(p)
    u = np.sign(g) + 0.3 * p
    paper = p - 0.1 * length / np.linalg.norm(u) * u
    got = lamb.step(p, g, State.zeros((40,)), o)
    np.testing.assert_allclose(got.p.value, paper, rtol=1e-12)
    clip = replace(o, trust_ratio="clip", max_unorm=0.5)
    ratio = min(1.0, 0.5 * length / np.sqrt(40))
    got = lamb.step(p, g, State.zeros((40,)), clip)
    np.testing.assert_allclose(got.p.value, 0.97 * p - 0.1 * ratio * np.sign(g), rtol=1e-12)
    assert got.ratio == pytest.approx(ratio)


def test_lamb_takes_ratio_one_where_a_norm_is_zero() -> None:
    zero, g = np.zeros(4), np.array([1.0, -1.0, 2.0, 0.5])
    for mode in ("lamb", "clip"):
        o = Options(eps=0.0, lr=0.1, trust_ratio=mode)
        np.testing.assert_allclose(
            lamb.step(zero, g, State.zeros((4,)), o).p.value, -0.1 * np.sign(g), rtol=1e-12
        )
        still = lamb.step(g, zero, State.zeros((4,)), replace(o, eps=1e-8))
        assert (still.p.value == g).all()


def _float32_adam(p: Any, g: Any, m: Any, v: Any, t: int) -> Any:
    """The formula in another factorization, every operation rounded to float32."""
    f = np.float32
    c1, c2 = 1 - 0.9**t, np.sqrt(1 - 0.999**t)
    m = (f(0.9) * m + f(1 - 0.9) * g).astype(f)
    v = (f(0.999) * v + f(1 - 0.999) * (g * g).astype(f)).astype(f)
    step = (m / (np.sqrt(v) + f(1e-8 * c2))).astype(f)
    return (p - f(1e-3 * c2 / c1) * step).astype(f), m, v


def test_error_bounds_hold_for_float32_and_are_tight() -> None:
    shape = (200_000,)
    p, m = (_random(shape, seed).astype(np.float32) for seed in (0, 1))
    v = (_random(shape, 2) ** 2).astype(np.float32)
    g = (-9 * m * (1 + 1e-3 * _random(shape, 3))).astype(np.float32)  # cancels in m
    before = {"exp_avg": m.astype(np.float64), "exp_avg_sq": v.astype(np.float64)}
    update = REFERENCES["adam"].step(p, g, State(4, before), Options())
    wanted = (update.p, update.moments["exp_avg"], update.moments["exp_avg_sq"])
    for got, want in zip(_float32_adam(p, g, m, v, 5), wanted, strict=True):
        excess = np.abs(got - want.value) / want.error
        assert 0.2 < excess.max() <= 1
    assert (update.p.error <= 1.1 * spacing(p, "float32") + 1e-6 * 1e-3 * 20).all()


@pytest.mark.parametrize(("name", "torch_dtype"), [
    ("float32", torch.float32), ("float16", torch.float16), ("bfloat16", torch.bfloat16)
])  # fmt: skip
def test_spacing(name: str, torch_dtype: torch.dtype) -> None:
    info = torch.finfo(torch_dtype)
    assert spacing(np.array(1.0), name) == info.eps
    assert spacing(np.array(1.99), name) == info.eps
    assert spacing(np.array(2.0), torch_dtype) == 2 * info.eps
    assert spacing(np.array(0.0), name) == info.smallest_normal * info.eps


def test_tracked_numbers_overflow_as_float32_does() -> None:
    top = float(np.finfo(np.float32).max)
    got = Tracked.exact([top, top * (1 + 1e-8), 4e38, -4e38, 1.0]).saturated().value
    with np.errstate(over="ignore"):
        want = np.array([top, top * (1 + 1e-8), 4e38, -4e38, 1.0]).astype(np.float32)
    assert got[[0, 4]].tolist() == [top, 1.0]
    assert (np.isinf(got) == np.isinf(want)).all()


def test_a_sign_that_rounding_may_decide_may_be_any() -> None:
    value = np.array([2.0, -3.0, 0.0, 1e-9, -1e-9])
    signs = Tracked(value, np.array([1e-7, 1e-7, 0.0, 1e-9, 0.0])).sign()
    assert signs.value.tolist() == [1, -1, 0, 1, -1]
    assert signs.error.tolist() == [0, 0, 0, 2, 0]
