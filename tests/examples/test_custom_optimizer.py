"""An optimizer from outside of the package has all that the built-in ones have."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from optfactory import build_optimizer, families, list_optimizers
from tests.conftest import on_cpus

EXAMPLE = Path(__file__).parents[2] / "examples" / "custom_optimizer.py"


@pytest.fixture(autouse=True)
def example(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The example's names, registered for one test."""
    monkeypatch.setattr(families, "_registered", {})
    return runpy.run_path(str(EXAMPLE), run_name="example")


def yogi(p: Tensor, gradients: list[Tensor], lr: float, decay: float) -> Tensor:
    """Algorithm 2 of the paper in float64, with decoupled decay."""
    theta, m, s = p.double(), torch.zeros_like(p).double(), torch.zeros_like(p).double()
    for t, gradient in enumerate(gradients, start=1):
        g = gradient.double()
        m = 0.9 * m + 0.1 * g
        s = s - 0.001 * (s - g**2).sign() * g**2
        step = (m / (1 - 0.9**t)) / ((s / (1 - 0.999**t)).sqrt() + 1e-3)
        theta = theta * (1 - lr * decay) - lr * step
    return theta


def trained(name: str, steps: int = 4) -> tuple[Tensor, Any]:
    generator = torch.Generator().manual_seed(1)
    p = torch.randn(80, 70, generator=generator).requires_grad_()
    gradients = [torch.randn(80, 70, generator=generator) for _ in range(steps)]
    expected = yogi(p.detach(), gradients, lr=0.01, decay=0.1)
    optimizer = build_optimizer(name, [p], lr=0.01, weight_decay=0.1)
    for gradient in gradients:
        p.grad = gradient
        optimizer.step()
    return p.detach() - expected, optimizer


def test_all_names_appear() -> None:
    assert len(list_optimizers("*yogi*")) == 12


@on_cpus
@pytest.mark.parametrize("name", ["yogi", "paged_yogi32bit"])
def test_32_bits_follow_the_paper(name: str, backend: str) -> None:
    error, _ = trained(name)
    assert error.abs().max() < 1e-6


@on_cpus
@pytest.mark.parametrize("name", ["yogi8bit", "paged_yogi8bit"])
def test_8_bits_follow_it_as_far_as_they_can(name: str, backend: str) -> None:
    error, optimizer = trained(name)
    assert error.abs().mean() < 1e-3
    assert {row.bits for row in optimizer.memory_report().rows} == {8}


def test_checkpoints_move_between_its_widths() -> None:
    _, optimizer = trained("yogi8bit")
    _, other = trained("paged_yogi", steps=1)
    other.load_state_dict(optimizer.state_dict())
    (state,) = other.state.values()
    assert state["step"] == 4
    assert "exp_avg_sq" in state


def test_the_example_prints_a_line_for_each_name(
    example: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    losses = {name: example["train"](name) for name in ("adamw", "yogi", "yogi8bit")}
    assert max(losses.values()) < 0.1
    assert len(capsys.readouterr().out.splitlines()) == 3
