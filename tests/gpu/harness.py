"""Tools of the tests that need a GPU: marks, the device, and training on given gradients."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from optfactory import Optimizer2State, build_optimizer, list_optimizers
from tests.conftest import missing_gpu
from tests.numerics.harness import bits, gradient

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(missing_gpu()), reason=missing_gpu() or "a CUDA device is there"),
]
DEVICE = torch.device("cuda", 0)
NAMES = list_optimizers()

# Two that get 8-bit state under 8-bit names and are paged from 1000 elements on, and two others.
SHAPES: list[tuple[int, ...]] = [(20, 300), (4097,), (70, 3), (255,)]


def numbers(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Numbers of about 0.1 N(0, 1), on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    return (0.1 * torch.randn(shape, generator=generator)).to(dtype)


def parameters(
    device: torch.device | str,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Trainable tensors, the same on every device."""
    return [
        numbers(shape, dtype, seed).to(device).requires_grad_() for seed, shape in enumerate(shapes)
    ]


# Most tests ask for the same ones, and drawing them takes longer than all the rest.
_gradient = lru_cache(maxsize=256)(gradient)


def gradients(params: Sequence[Tensor], step: int) -> list[Tensor]:
    """Gradients that depend on the step and a parameter's place only, beside the parameters."""
    return [
        _gradient(tuple(p.shape), p.dtype, 1000 * step + index).to(p.device, copy=True)
        for index, p in enumerate(params)
    ]


def give(params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad


def train(optimizer: Optimizer2State, params: Sequence[Tensor], steps: range) -> None:
    for step in steps:
        give(params, gradients(params, step))
        optimizer.step()


def trained(name: str, params: Sequence[Tensor], steps: int = 3, **options: Any) -> Optimizer2State:
    """An optimizer of these parameters after some steps."""
    optimizer = build_optimizer(name, list(params), **options)
    train(optimizer, params, range(steps))
    return optimizer


def content(optimizer: Optimizer2State) -> list[bytes]:
    """The bytes of all parameters and states in order."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    tensors = [t for p in params for t in (p, *optimizer.state[p].values())]
    return [bits(tensor).tobytes() for tensor in tensors]


def busy(seconds: float) -> None:
    """Occupies torch's current stream for about as long; returns at once."""
    torch.cuda._sleep(int(seconds * 1.7e9))  # in cycles, of which a GPU makes 1 to 2 a nanosecond
