"""LAMB's trust ratio: applied at 32 and 8 bits, in both modes, and reproducible to the bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from optfactory import build_optimizer
from tests.devices import randn
from tests.numerics.harness import Twin, array, bits, gradient

SHAPE = (64, 300)
widths = pytest.mark.parametrize("width", [32, 8])


def _parameter(scale: float, shape: tuple[int, ...] = SHAPE) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return (scale * randn(shape, generator)).requires_grad_()


def _one_step(name: str, p: Tensor, **asked: Any) -> Tensor:
    """Displacement of a clone of p by one step with a fixed gradient."""
    moved = p.detach().clone().requires_grad_()
    moved.grad = gradient(tuple(p.shape), torch.float32, 5)
    build_optimizer(name, [moved], **asked).step()
    return moved.detach() - p.detach()


@widths
@pytest.mark.parametrize(("scale", "above_one"), [(100.0, True), (0.01, False)])
def test_ratio_above_and_below_one(width: int, scale: float, above_one: bool, backend: str) -> None:
    twin = Twin("lamb", [_parameter(scale)], optim_bits=width, lr=1e-2)
    for step in range(4):
        (update,) = twin.step(step)
        assert update.ratio > 2 if above_one else update.ratio < 0.5


@widths
def test_the_ratio_is_applied_to_the_step(width: int, backend: str) -> None:
    """Without decay a LAMB step is an Adam step times |p| / |u|; only the length differs."""
    p = _parameter(3.0)
    shared: dict[str, Any] = {"lr": 1e-3, "eps": 1e-6, "weight_decay": 0.0, "optim_bits": width}
    adam, lamb = _one_step("adam", p, **shared), _one_step("lamb", p, **shared)
    ratio = float(p.detach().norm() / (adam.norm() / shared["lr"]))
    assert ratio > 2
    torch.testing.assert_close(lamb, ratio * adam, rtol=1e-4, atol=2e-6)
    length = float(lamb.double().norm() / p.detach().double().norm())
    assert length == pytest.approx(shared["lr"], rel=1e-4)


def test_lamb8bit_is_not_adam8bit(backend: str) -> None:
    p = _parameter(3.0)
    adam = _one_step("adamw8bit", p, eps=1e-6)
    lamb = _one_step("lamb8bit", p)
    assert float(lamb.norm() / adam.norm()) > 2
    same = _one_step("lamb8bit", p, trust_ratio="clip", max_unorm=0.0)
    torch.testing.assert_close(same, adam, rtol=1e-5, atol=1e-6)


@widths
def test_zero_tensor_moves(width: int, backend: str) -> None:
    for asked in ({}, {"trust_ratio": "clip", "max_unorm": 0.5}):
        p = torch.zeros(SHAPE, requires_grad=True)
        twin = Twin("lamb", [p], optim_bits=width, lr=1e-2, **asked)
        (first,) = twin.step(0)
        assert first.ratio == 1.0
        assert float(p.detach().abs().max()) > 5e-3
        twin.step(1)


@widths
def test_zero_gradient_leaves_only_the_decay(width: int, backend: str) -> None:
    start = _parameter(0.1)
    for decay in (0.0, 0.1):
        p = start.detach().clone().requires_grad_()
        twin = Twin("lamb", [p], optim_bits=width, lr=1e-2, weight_decay=decay)
        (update,) = twin.step(0, grads=[torch.zeros(SHAPE)])
        if decay == 0:
            assert torch.equal(p, start)
            assert update.ratio == 1.0
        else:  # u = wd * p, so that ratio * u = p: the step is lr * p whatever wd is
            torch.testing.assert_close(p, start * (1 - 1e-2), rtol=1e-6, atol=0)


@widths
def test_decay_is_inside_the_measured_update(width: int, backend: str) -> None:
    """With u = r + wd * p the step's length is lr * |p| for every weight decay."""
    p = _parameter(1.0)
    lengths, directions = [], []
    for decay in (0.0, 0.1, 10.0):
        step = _one_step("lamb", p, lr=1e-3, weight_decay=decay, optim_bits=width).double()
        lengths.append(float(step.norm() / p.detach().double().norm()))
        directions.append(step / step.norm())
    np.testing.assert_allclose(lengths, 1e-3, rtol=1e-4)
    assert float((directions[0] * directions[2]).sum()) < 0.9


@widths
@pytest.mark.parametrize("max_unorm", [0.02, 1.0, None, 0.0])
def test_clip_never_enlarges(width: int, max_unorm: float | None, backend: str) -> None:
    for scale in (0.001, 100.0):
        asked: dict[str, Any] = {"trust_ratio": "clip", "max_unorm": max_unorm, "lr": 1e-2}
        twin = Twin("lamb", [_parameter(scale)], optim_bits=width, **asked)
        (update,) = twin.step(0)
        assert update.ratio <= 1
        expect_clipped = scale == 0.001 and max_unorm != 0.0
        assert (update.ratio < 1) == expect_clipped


@widths
def test_each_tensor_has_its_own_ratio(width: int, backend: str) -> None:
    """Tensors of one bucket, small and large, do not leak norms into one another."""
    params = [_parameter(s, shape) for s, shape in ((10.0, SHAPE), (0.01, SHAPE), (1.0, (5,)))]
    twin = Twin("lamb", params, optim_bits=width, lr=1e-2)
    ratios = [update.ratio for update in twin.step(0)]
    assert len({round(ratio, 3) for ratio in ratios}) == 3
    twin.step(1)


@widths
def test_same_bits_for_any_number_of_threads(width: int, backend: str) -> None:
    shapes = [(150_001,), (70, 64), (3,)]
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        params = [_parameter(0.1, shape) for shape in shapes]
        optimizer = build_optimizer("lamb", params, optim_bits=width, lr=1e-2)
        for step in range(2):
            for i, p in enumerate(params):
                p.grad = gradient(tuple(p.shape), p.dtype, 10 * step + i)
            optimizer.step()
        results.append([bits(p) for p in params])
    for one, two in zip(*results, strict=True):
        assert (one == two).all()


def test_ratio_of_a_large_tensor_is_accurate(backend: str) -> None:
    """A million equal elements: a sum that loses digits would show in the ratio."""
    p = torch.full((1_000_003,), 0.1, requires_grad=True)
    twin = Twin("lamb", [p], optim_bits=32, lr=1e-2, weight_decay=0.0)
    twin.step(0, grads=[torch.full((1_000_003,), 0.3)])
    assert array(p).std() < 1e-12
