"""What no width may do: kick elements that rest, lose a second moment first, depend on sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from optfactory import build_optimizer, get_optimizer_info, list_optimizers
from tests.conformance.harness import Deviation
from tests.families import states_of

NARROW = [
    info.name
    for info in map(get_optimizer_info, list_optimizers())
    if info.optim_bits in (4, 8, 16) and not info.is_paged and states_of(info.name)
]
ADAMS = ["adamw4bit", "adamw8bit", "adamwfp8", "adamw16bit"]
# Without what moves an element whose gradient is 0: decay, and scales of whole tensors.
STILL: dict[str, dict[str, Any]] = {"muon": {"min_8bit_size": 1}}


@pytest.mark.parametrize("name", [name for name in NARROW if not name.startswith("muon")])
def test_elements_without_gradients_stay_bit_identical(name: str) -> None:
    """Beside large ones in their blocks, over 100 steps."""
    p = torch.randn(16, 512).requires_grad_()
    before, resting = p.detach().clone(), torch.arange(512) % 3 > 0
    optimizer = build_optimizer(name, [p], weight_decay=0.0)
    for _ in range(100):
        p.grad = torch.randn(16, 512) * torch.rand(16, 1) * 100
        p.grad[:, resting] = 0.0
        optimizer.step()
    assert torch.equal(p.detach()[:, resting], before[:, resting])
    assert (p.detach()[:, ~resting] != before[:, ~resting]).any()


@pytest.mark.parametrize("name", ADAMS)
def test_activity_that_ends_decays_without_a_kick(name: str, deviation: Deviation) -> None:
    """Half the elements of each block have a gradient for 50 steps, and then none for 400."""
    ways, longest = [], []
    for each in ("adamw32bit", name):
        p = torch.zeros(16, 512).requires_grad_()
        optimizer = build_optimizer(each, [p], lr=1e-3, weight_decay=0.0)
        resting, sizes = torch.arange(512) % 2 == 0, []
        generator = torch.Generator().manual_seed(0)
        for step in range(450):
            before = p.detach().clone()
            p.grad = torch.randn(16, 512, generator=generator).abs()
            if step >= 50:
                p.grad[:, resting] = 0.0
            optimizer.step()
            sizes.append((p.detach() - before)[:, resting].abs() / 1e-3)
        ways.append(float(torch.stack(sizes[50:]).sum(dim=0).mean()))
        longest.append(float(torch.stack(sizes[50:]).max()))
        assert float(sizes[-1].max()) < 1e-2
    deviation("way after the end, relative", abs(ways[1] / ways[0] - 1), 0.15)
    deviation("longest step after the end, in learning rates", longest[1], 3.2)


def _way(name: str, size: float, **asked: Any) -> Tensor:
    """How far 200 steps of one gradient lead, in learning rates: ascending, and descending."""
    p = torch.zeros(2, 4096).requires_grad_()
    optimizer = build_optimizer(name, [p], lr=1e-3, weight_decay=0.0, **asked)
    sign = torch.tensor([[1.0], [-1.0]])
    for _ in range(200):
        p.grad = (size * sign).expand(2, 4096).contiguous()
        optimizer.step()
    return p.detach().double() / 1e-3


@pytest.mark.parametrize("size", [10.0**-power for power in range(4, 21)])
@pytest.mark.parametrize("name", ADAMS)
def test_constant_gradients_of_all_sizes(name: str, size: float, deviation: Deviation) -> None:
    """As far as at 32 bits, in both directions: on the average, and nearly so every element."""
    wide, narrow = _way("adamw32bit", size), _way(name, size)
    mean = float((narrow.mean(dim=1) / wide.mean(dim=1) - 1).abs().max())
    deviation("way, relative", mean, 0.01)
    worst = float(((narrow - wide).abs() / wide.abs()).max())
    deviation("way of one element, relative", worst, 0.03)
