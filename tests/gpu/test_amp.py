"""GradScaler on the GPU: unscaling by torch, and handed over to the kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from optfactory import Optimizer2State, build_optimizer
from tests.gpu.harness import DEVICE, content, needs_gpu, parameters
from tests.numerics.harness import bits

pytestmark = needs_gpu

NAMES = ["adam", "adamw8bit", "lamb", "lamb8bit"]


def backward(params: list[Tensor], factor: float, scaler: torch.amp.GradScaler | None) -> None:
    for p in params:
        p.grad = None
    loss = sum(((p * factor).sin().sum() for p in params), torch.zeros((), device=DEVICE))
    (loss if scaler is None else scaler.scale(loss)).backward()


def scaled_steps(
    optimizer: Optimizer2State, params: list[Tensor], scaler: torch.amp.GradScaler, steps: int = 3
) -> None:
    for step in range(steps):
        backward(params, step + 1.0, scaler)
        scaler.step(optimizer)
        scaler.update()


def plain_steps(optimizer: Optimizer2State, params: list[Tensor], steps: int = 3) -> None:
    for step in range(steps):
        backward(params, step + 1.0, None)
        optimizer.step()


def handed_over(name: str, params: list[Tensor], capturable: bool) -> Optimizer2State:
    """An optimizer that takes the scale and the finding of infinities into its step."""
    optimizer = build_optimizer(name, params, lr=0.01, capturable=capturable)
    optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]
    return optimizer


@pytest.mark.parametrize("name", NAMES)
def test_scaled_gradients_train_as_plain_ones(name: str) -> None:
    params, others = parameters(DEVICE), parameters(DEVICE)
    optimizer, plain = (build_optimizer(name, side, lr=0.01) for side in (params, others))
    scaled_steps(optimizer, params, torch.amp.GradScaler("cuda", init_scale=2.0**16))
    plain_steps(plain, others)
    assert content(optimizer) == content(plain)


@pytest.mark.parametrize("scale", [2.0**16, 1000.0])
@pytest.mark.parametrize("capturable", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_a_scale_handed_over_acts_as_unscaling_does(
    name: str, capturable: bool, scale: float
) -> None:
    params, others = parameters(DEVICE), parameters(DEVICE)
    optimizer = handed_over(name, params, capturable)
    ordinary = build_optimizer(name, others, lr=0.01, capturable=capturable)
    scaled_steps(optimizer, params, torch.amp.GradScaler("cuda", init_scale=scale))
    scaled_steps(ordinary, others, torch.amp.GradScaler("cuda", init_scale=scale))
    assert content(optimizer) == content(ordinary)


@pytest.mark.parametrize("handed", [False, True])
@pytest.mark.parametrize("capturable", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_that_overflow_change_nothing(name: str, capturable: bool, handed: bool) -> None:
    params = parameters(DEVICE)
    optimizer = handed_over(name, params, capturable)
    optimizer._step_supports_amp_scaling = handed  # type: ignore[attr-defined]
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    scaled_steps(optimizer, params, scaler)
    before = content(optimizer)
    backward(params, 1.0, scaler)
    grad = params[1].grad
    assert grad is not None
    grad[7] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    assert content(optimizer) == before
    assert scaler.get_scale() == 512.0
    scaled_steps(optimizer, params, scaler, steps=1)
    assert content(optimizer) != before
    assert all(float(optimizer.state[p]["step"]) == 4 for p in params)


@pytest.mark.parametrize("handed", [False, True])
def test_gradients_unscaled_for_clipping_are_not_unscaled_again(handed: bool) -> None:
    params, others = parameters(DEVICE), parameters(DEVICE)
    optimizer = handed_over("adamw8bit", params, capturable=False)
    optimizer._step_supports_amp_scaling = handed  # type: ignore[attr-defined]
    plain = build_optimizer("adamw8bit", others, lr=0.01)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    for step in range(3):
        backward(params, step + 1.0, scaler)
        backward(others, step + 1.0, None)
        scaler.unscale_(optimizer)
        for side in (params, others):
            nn.utils.clip_grad_norm_(side, 0.5)
        scaler.step(optimizer)
        scaler.update()
        plain.step()
    assert [bits(p).tobytes() for p in params] == [bits(p).tobytes() for p in others]


@pytest.fixture
def reset_sync_debug_mode() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("name", NAMES)
def test_handed_over_and_capturable_nothing_waits(name: str, reset_sync_debug_mode: None) -> None:
    params = parameters(DEVICE)
    optimizer = handed_over(name, params, capturable=True)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    scaled_steps(optimizer, params, scaler)
    for overflows in (False, True):
        backward(params, 1.0, scaler)
        if overflows:
            grad = params[0].grad
            assert grad is not None
            grad.fill_(torch.inf)
        torch.cuda.set_sync_debug_mode("error")
        scaler.step(optimizer)
        torch.cuda.set_sync_debug_mode("default")
        scaler.update()
    assert all(float(optimizer.state[p]["step"]) == 4 for p in params)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_trains_float32_parameters(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 1)).to(DEVICE)
    optimizer = build_optimizer("adamw8bit", model, lr=1e-2)
    scaler = torch.amp.GradScaler("cuda")
    inputs = torch.randn(256, 64, device=DEVICE)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=dtype):
            loss = (model(inputs).squeeze(1) - inputs[:, 0]).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
