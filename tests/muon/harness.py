"""Muon in plain torch, in float64, and matrices to train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from optfactory import Optimizer2State, build_optimizer
from tests.numerics.harness import bits, gradient

MUON = (3.4445, -4.7750, 2.0315)
SHAPES = [(48, 80), (80, 48), (48, 48), (96, 64), (3, 40), (48, 80)]

Triples = Sequence[tuple[float, float, float]]


def matrices(
    shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Trainable matrices of about 0.1 N(0, 1)."""
    generator = torch.Generator().manual_seed(1)
    made = [0.1 * torch.randn(shape, generator=generator) for shape in shapes]
    return [p.to(dtype).requires_grad_() for p in made]


def named(params: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
    """Pairs with names that mean nothing."""
    return [(f"layers.{number}.weight", p) for number, p in enumerate(params)]


def built(params: Sequence[Tensor], name: str = "muon", **asked: Any) -> Optimizer2State:
    return build_optimizer(name, named(params), **asked)


def give(params: Sequence[Tensor], step: int, dtype: torch.dtype | None = None) -> None:
    """Gradients that depend on the parameter's place and the step."""
    for number, p in enumerate(params):
        p.grad = gradient(tuple(p.shape), torch.float32, 1000 * step + number).to(dtype or p.dtype)


def give_graded(params: Sequence[Tensor], step: int) -> None:
    """Gradients whose rows are of different lengths, in another order in each step."""
    for number, p in enumerate(params):
        generator = torch.Generator().manual_seed(1000 * step + number)
        g = torch.randn(p.shape, generator=generator)
        rows = g.view(-1, p.shape[-1]) if p.ndim < 4 else g.view(len(p), -1)
        rows *= torch.logspace(0, -1.5, len(rows)).roll(5 * step)[:, None]
        p.grad = g


def train(optimizer: torch.optim.Optimizer, params: Sequence[Tensor], steps: range) -> None:
    for step in steps:
        give(params, step)
        optimizer.step()


def all_bits(optimizer: Optimizer2State) -> dict[str, bytes]:
    """The bytes of all parameters and states, by name."""
    found = {}
    for group in optimizer.param_groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            found[name] = bits(p).tobytes()
            for key, value in optimizer.state[p].items():
                found[f"{name}.{key}"] = bits(value).tobytes()
    return found


def moments(optimizer: Optimizer2State) -> list[Tensor]:
    """Copies of those of all parameters."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [optimizer.state[p]["neuron_second_moment"].clone() for p in params]


def iterated(x: Tensor, triples: Triples, eps: float = 1e-7) -> Tensor:
    """Jordan's iteration, in the dtype of x."""
    x = x / x.norm().clamp(min=eps)
    for a, b, c in triples:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


@dataclass
class PlainMuon:
    """One matrix and its momentum, in float64."""

    p: Tensor
    lr: float = 1e-3
    weight_decay: float = 0.1
    momentum: float = 0.95
    nesterov: bool = True
    triples: Triples = (MUON,) * 5
    eps: float = 1e-7
    adjust_lr: str = "match_rms_adamw"
    cautious: bool = False
    neuron_beta: float | None = None  # rows are normalised by NorMuon, if there is one
    buffer: Tensor = field(init=False)
    neurons: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.p = self.p.detach().double()
        self.buffer = torch.zeros_like(self.p)
        self.neurons = torch.zeros(len(self.p), 1, dtype=torch.float64)

    def step(self, g: Tensor) -> None:
        g, mu = g.double(), self.momentum
        self.buffer = mu * self.buffer + (1 - mu) * g
        u = mu * self.buffer + (1 - mu) * g if self.nesterov else self.buffer
        u = iterated(u, self.triples, self.eps)
        if self.neuron_beta is not None:
            u = self._normalised(u, self.neuron_beta)
        rows, cols = u.shape
        factor = 0.2 * max(rows, cols) ** 0.5
        if self.adjust_lr == "original":
            factor = max(1.0, rows / cols) ** 0.5
        kept = (u * self.p >= 0).double() if self.cautious else 1.0
        self.p = self.p - self.lr * self.weight_decay * kept * self.p - self.lr * factor * u

    def _normalised(self, u: Tensor, beta: float) -> Tensor:
        """Li et al. 2025 (arXiv:2510.05491), as their normuon.py at e5aaaf42 has it."""
        self.neurons = beta * self.neurons + (1 - beta) * (u * u).mean(dim=1, keepdim=True)
        scaled = u / (self.neurons.sqrt() + 1e-10)
        return scaled * (u.norm() / (scaled.norm() + 1e-10))


def assert_follows(got: Tensor, want: PlainMuon, start: Tensor, bound: float = 1e-5) -> None:
    """The way from the start is the plain one's, relative to its length."""
    way, wanted = got.detach().double() - start.double(), want.p - start.double()
    rounding = 1e-7 * float(start.double().norm())
    assert float((way - wanted).norm()) <= bound * float(wanted.norm()) + rounding


def plain_settings(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What of a config PlainMuon has by the same name."""
    return {key: value for key, value in asked.items() if key in PlainMuon.__dataclass_fields__}
