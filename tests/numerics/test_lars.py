"""LARS's rate: of the parameter's and the gradient's norm, before the momentum, at 8 bits too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from optfactory import build_optimizer
from tests.devices import randn
from tests.numerics.harness import Twin, bits, gradient

SHAPE = (64, 300)
widths = pytest.mark.parametrize("width", [32, 8])
WHOLE: dict[str, Any] = {"optim_bits": 8, "block_wise": False}


def _parameter(scale: float, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return (scale * randn(shape, torch.Generator().manual_seed(2))).requires_grad_()


def _step(p: Tensor, g: Tensor, **asked: Any) -> Tensor:
    """Displacement of a clone of p by one step."""
    moved = p.detach().clone().requires_grad_()
    moved.grad = g
    build_optimizer("lars", [moved], **asked).step()
    return moved.detach() - p.detach()


@widths
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_first_step_is_a_share_of_the_parameter(width: int, scale: float, backend: str) -> None:
    """lr * trust_coefficient * |p| long, however long the gradient is (Equation 6)."""
    p, asked = _parameter(2.0), {"lr": 0.5, "trust_coefficient": 0.02, "optim_bits": width}
    step = _step(p, scale * gradient(SHAPE, torch.float32, 5), **asked)
    share = float(step.double().norm() / p.detach().double().norm())
    assert share == pytest.approx(0.5 * 0.02, rel=1e-4)


@widths
def test_the_rate_counts_what_enters_the_rule(width: int, backend: str) -> None:
    """Neither elements that stay nor the sign of `maximize` change a first step's length."""
    p, g = _parameter(2.0), gradient(SHAPE, torch.float32, 5)
    asked: dict[str, Any] = {"optim_bits": width, "trust_coefficient": 0.02}
    up, down = _step(p, g, maximize=True, **asked), _step(p, g, **asked)
    torch.testing.assert_close(up, -down, rtol=1e-4, atol=1e-6)
    g[3, 5] = float("inf")
    held = _step(p, g, nonfinite="skip_element", **asked)
    assert held[3, 5] == 0
    assert float(held.norm()) == pytest.approx(0.02 * float(p.detach().norm()), rel=1e-4)


@pytest.mark.parametrize("asked", [{"optim_bits": 32}, {"optim_bits": 8}, WHOLE], ids=str)
def test_the_momentum_holds_scaled_gradients(asked: dict[str, Any], backend: str) -> None:
    """So that the past is not scaled again: the buffer follows the parameter's norm."""
    twin = Twin("lars", [_parameter(100.0), _parameter(0.01)], weight_decay=0.1, **asked)
    for step in range(4):
        twin.step(step)


@pytest.mark.parametrize("mode", ["lars", "clip"])
@widths
def test_a_tensor_of_zeros_moves(mode: str, width: int, backend: str) -> None:
    p = torch.zeros(SHAPE, requires_grad=True)
    twin = Twin("lars", [p], optim_bits=width, lr=1e-2, trust_ratio=mode)
    twin.step(0)
    assert float(p.detach().abs().max()) > 5e-3
    twin.step(1)


@widths
def test_a_gradient_of_zeros_leaves_only_the_decay(width: int, backend: str) -> None:
    for decay in (0.0, 0.1):
        p = _parameter(1.0)
        start = p.detach().clone()
        p.grad = torch.zeros(SHAPE)
        build_optimizer("lars", [p], lr=0.5, optim_bits=width, weight_decay=decay).step()
        torch.testing.assert_close(p.detach(), start * (1 - 0.5 * decay), rtol=1e-6, atol=0)


@pytest.mark.parametrize("asked", [{"optim_bits": 32}, {"optim_bits": 8}, WHOLE], ids=str)
def test_same_bits_for_any_number_of_threads(asked: dict[str, Any], backend: str) -> None:
    results = []
    for threads in (1, 2):
        torch.set_num_threads(1)
        params = [_parameter(0.1, shape) for shape in ((150_001,), (70, 64), (3,))]
        optimizer = build_optimizer("lars", params, **asked)
        for step in range(3):
            for number, p in enumerate(params):
                p.grad = gradient(tuple(p.shape), torch.float32, 10 * step + number)
            torch.set_num_threads(threads)
            optimizer.step()
            torch.set_num_threads(1)
        results.append([bits(p).tobytes() for p in params])
    assert results[0] == results[1]
