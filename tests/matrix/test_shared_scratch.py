"""Steps share one piece of scratch memory, which is large enough whatever is trained."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from optfactory import build_optimizer
from optfactory.step.scratch import scratch_bytes

pytestmark = pytest.mark.filterwarnings("ignore:the parameters have no names")

SHAPES = [(5, 7), (7, 5), (33, 65), (1, 3), (2, 3, 5)]


def stepped(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    for p in parameters:
        p.grad = torch.randn(p.shape) if p.requires_grad else None
    optimizer.step()


def test_shapes_of_any_size() -> None:
    parameters = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    for some in (*([p] for p in parameters), parameters):
        stepped(build_optimizer("muon32bit", some), some)
        assert all(bool(p.isfinite().all()) for p in some)


def test_parameters_that_are_trained_later() -> None:
    parameters = [nn.Parameter(torch.randn(shape)) for shape in ((8, 8), (40, 40))]
    small, large = parameters
    large.requires_grad_(False)
    optimizer = build_optimizer("muon32bit", parameters)
    stepped(optimizer, parameters)
    before = large.detach().clone()
    large.requires_grad_(True)
    stepped(optimizer, parameters)
    assert not torch.equal(large, before)
    plan = optimizer._current_plan()
    (share,) = plan.scratch._shares.values()
    assert share.memory.nbytes == scratch_bytes(plan.slots, small.device)
