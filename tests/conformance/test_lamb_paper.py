"""lamb beside the paper's formula in float64, at 32 and 8 bits, and beside timm's Lamb."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from optfactory import build_optimizer, list_optimizers
from tests.conformance.harness import Deviation, apart, feed, pair, peer
from tests.conformance.lamb_paper import Layer, Quantization
from tests.numerics.harness import array, gradient

SHAPES = [(257,), (33, 300), (16, 8, 3, 3)]
STEPS = 60
LR = 1e-2

corrected = pytest.mark.parametrize("bias_correction", [True, False], ids=["corrected", "biased"])


def _follow(
    params: list[Tensor], deviation: Deviation, steps: int = STEPS, **asked: Any
) -> list[Layer]:
    """Train layers of the paper beside the optimizer; p agrees to 1e-6 of its path."""
    layers = [Layer(array(p), LR, **asked) for p in params]
    lengths = [0.0] * len(params)
    optimizer = build_optimizer("lamb32bit", params, lr=LR, **asked)
    for step in range(steps):
        feed(step, params)
        optimizer.step()
        for number, (p, layer) in enumerate(zip(params, layers, strict=True)):
            layer.step(array(p.grad))
            lengths[number] += LR * layer.ratio * float(np.abs(layer.u).max())
            deviation("p, relative", apart(p, torch.from_numpy(layer.x), lengths[number]), 1e-6)
    return layers


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@corrected
def test_32_bits_take_the_steps_of_the_paper(
    bias_correction: bool, weight_decay: float, backend: str, deviation: Deviation
) -> None:
    """Tensors of norm 0.1 and 10 for each element, so that ratios lie on both sides of 1."""
    params, _ = pair(SHAPES)
    with torch.no_grad():
        params[1].mul_(100)
    asked = {"weight_decay": weight_decay, "bias_correction": bias_correction}
    layers = _follow(params, deviation, **asked)
    assert layers[0].ratio < 0.9 < 2 < layers[1].ratio


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_norms_of_zero(weight_decay: float, backend: str, deviation: Deviation) -> None:
    """Zero weights move with the ratio 1; without gradient and decay nothing moves."""
    params = [torch.zeros(20, 300, requires_grad=True)]
    layers = _follow(params, deviation, steps=5, weight_decay=weight_decay)
    assert layers[0].x.any()
    (still,), _ = pair([(20, 300)])
    start = array(still)
    layer = Layer(start, LR, weight_decay=weight_decay)
    optimizer = build_optimizer("lamb", [still], lr=LR, weight_decay=weight_decay)
    for _ in range(5):
        still.grad = torch.zeros_like(still)
        optimizer.step()
        layer.step(np.zeros_like(start))
    deviation("p, relative", apart(still, torch.from_numpy(layer.x), 0.0), 1e-6)
    assert bool((array(still) == start).all()) == (weight_decay == 0)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@corrected
@pytest.mark.parametrize("name", list_optimizers("*lamb8bit"))
def test_8_bits_stay_within_what_quantization_explains(
    name: str, bias_correction: bool, weight_decay: float, backend: str, deviation: Deviation
) -> None:
    """Free-running; the tolerance follows from the map's cells and grows with every store.

    Gradients keep their size within a factor of two, for an interval around a second moment that
    may have become 0 would allow anything.
    """
    (p,), _ = pair([(20, 300)])
    with torch.no_grad():
        p.mul_(20)
    asked = {"weight_decay": weight_decay, "bias_correction": bias_correction}
    layer = Layer(array(p), LR, **asked)
    quantization, path = Quantization(layer), np.zeros(p.shape)
    optimizer = build_optimizer(name, [p], lr=LR, **asked)
    for step in range(10):
        generator = torch.Generator().manual_seed(step)
        size = 0.5 + 0.5 * torch.rand(20, 300, generator=generator, device="cpu")
        p.grad = (gradient((20, 300), p.dtype, 7).sign() * size.to(p.device)).to(p.dtype)
        before = layer.x
        optimizer.step()
        layer.step(array(p.grad))
        quantization.step(before)
        path += np.abs(layer.x - before)
        rounding = 1e-6 * (np.abs(layer.x) + path)
        error = np.abs(array(p) - layer.x)
        deviation("p, of what is allowed", (error / (quantization.x + rounding)).max(), 1)
    moved = path > 0
    assert quantization.x[moved].mean() < 0.2 * path[moved].mean()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("name", list_optimizers("*lamb*"))
def test_every_step_has_the_length_of_the_paper(
    name: str, weight_decay: float, backend: str, deviation: Deviation
) -> None:
    """|x_{t+1} - x_t| = eta |x_t|, whatever the moments are: at 8 bits as at 32."""
    (p,), _ = pair([(33, 300)])
    optimizer = build_optimizer(name, [p], lr=LR, weight_decay=weight_decay)
    for step in range(20):
        before = array(p)
        feed(step, [p])
        optimizer.step()
        length = np.linalg.norm(array(p) - before) / np.linalg.norm(before)
        deviation("length of a step, relative", abs(length / LR - 1), 1e-5)


@pytest.mark.parametrize("always_adapt", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
@corrected
def test_lamb_of_timm(
    bias_correction: bool,
    weight_decay: float,
    always_adapt: bool,
    backend: str,
    deviation: Deviation,
) -> None:
    """Without its clipping of gradients by their norm over all tensors, which is on by default."""
    kind = peer("timm.optim").Lamb
    pairs = pair(SHAPES)
    asked = {
        "lr": LR, "eps": 1e-6, "weight_decay": weight_decay, "bias_correction": bias_correction,
        "always_adapt": always_adapt,
    }  # fmt: skip
    optimizers = (
        build_optimizer("lamb", pairs[0], **asked),
        kind(pairs[1], max_grad_norm=None, **asked),
    )
    for step in range(STEPS):
        feed(step, *pairs)
        for optimizer in optimizers:
            optimizer.step()
    for p, their in zip(*pairs, strict=True):
        deviation("p, relative", apart(p, their, STEPS * LR), 1e-6)
