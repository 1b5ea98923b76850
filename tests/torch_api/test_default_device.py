"""A default device for tensors that name none: scripts set one, and build models under one."""

from __future__ import annotations

import copy

import pytest
import torch

from optfactory import Optimizer2State, build_optimizer
from tests.torch_api.harness import assert_same_training, held, parameters

pytestmark = pytest.mark.usefixtures("small_tensors")


def grads_of(optimizer: Optimizer2State) -> list[torch.Tensor]:
    """Gradients that are not contiguous where they can be, so that kernels read strides too."""
    torch.manual_seed(0)
    flipped = [torch.randn(p.shape[::-1]).to(p.dtype) for p in held(optimizer)]
    return [grad.permute(tuple(range(grad.ndim))[::-1]) for grad in flipped]


@pytest.mark.parametrize(
    ("name", "capturable"), [("adam", False), ("adam8bit", True), ("paged_lamb8bit", False)]
)
def test_the_default_device_changes_nothing(name: str, capturable: bool, backend: str) -> None:
    if capturable and backend not in ("emulated", "cuda"):
        pytest.skip("capturable is for CUDA kernels")

    def run(device: str) -> Optimizer2State:
        optimizer = build_optimizer(name, parameters(), capturable=capturable)
        grads = grads_of(optimizer)
        with torch.device(device):
            for _ in range(2):
                for p, grad in zip(held(optimizer), grads, strict=True):
                    p.grad = grad
                optimizer.step()
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            optimizer.step()
        return optimizer

    assert_same_training(run("meta"), run("cpu"))
