"""What torch.amp.GradScaler hands over: a factor to divide by, and whether to skip the step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optfactory import Optimizer2State, build_optimizer
from optfactory.backends.reference.backend import ReferenceBackend
from tests.emulation.harness import (
    NATIVE,
    Shape,
    assert_same,
    emulator,
    held,
    is_same,
    on,
    set_gradient,
    values,
)
from tests.numerics.harness import gradient
from tests.torch_api.harness import snapshot
from tests.unit.harness import needs_compiler

pytestmark = needs_compiler

SHAPES: list[Shape] = [(300,), (70, 64), (33, 300)]
names = pytest.mark.parametrize("name", ["adam32bit", "adamw8bit", "lamb32bit", "lamb8bit"])


@pytest.fixture(params=["cpu", "reference", "emulated", "emulated-capturable"])
def asked(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """Every backend, with steps on the device too; what to ask for to get it."""
    kind, _, capturable = request.param.partition("-")
    backends = {"cpu": NATIVE, "reference": ReferenceBackend(), "emulated": emulator()[0]}
    with on(backends[kind]):
        yield {"capturable": True} if capturable else {}


def build(name: str, asked: dict[str, Any], dtype: torch.dtype = torch.float32) -> Optimizer2State:
    params = [values(shape, dtype, i).requires_grad_() for i, shape in enumerate(SHAPES)]
    return build_optimizer(name, params, lr=0.01, **asked)


def loss_of(optimizer: Optimizer2State, step: int) -> Tensor:
    """A loss whose gradients are those of the step's number."""
    terms = [
        (p * gradient(tuple(p.shape), p.dtype, 100 * step + i)).sum()
        for i, p in enumerate(held(optimizer))
    ]
    return torch.stack(terms).sum()


def backward(optimizer: Optimizer2State, step: int, scaler: torch.amp.GradScaler | None) -> None:
    optimizer.zero_grad()
    loss = loss_of(optimizer, step)
    (loss if scaler is None else scaler.scale(loss)).backward()


def claim(optimizer: Optimizer2State) -> None:
    """Say that the optimizer divides and skips by itself, as CUDA users with graphs do."""
    optimizer._step_supports_amp_scaling = True


@names
def test_scales_are_handed_over_and_gradients_stay(name: str, asked: dict[str, Any]) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaled, plain = build(name, asked), build(name, asked)
    claim(scaled)
    for step in range(3):
        backward(scaled, step, scaler)
        backward(plain, step, None)
        kept = [p.grad.clone() for p in held(scaled)]
        scaler.step(scaled)
        scaler.update()
        plain.step()
        for p, before in zip(held(scaled), kept, strict=True):
            assert torch.equal(p.grad, before)
        assert not hasattr(scaled, "grad_scale")
    assert_same(scaled, plain)


@names
def test_a_step_with_bad_gradients_changes_nothing(name: str, asked: dict[str, Any]) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaled, plain = build(name, asked), build(name, asked)
    claim(scaled)
    for step in range(4):
        backward(scaled, step, scaler)
        if step in (0, 2):  # before there is any state, and later
            held(scaled)[1].grad[3, 5] = float("nan") if step else float("inf")
            scaled.init_states()
            before = snapshot(scaled)
            kept = [p.grad.clone() for p in held(scaled)]
            scaler.step(scaled)
            assert snapshot(scaled) == before
            for p, grad in zip(held(scaled), kept, strict=True):
                assert is_same(p.grad, grad)
        else:
            scaler.step(scaled)
            backward(plain, step, None)
            plain.step()
        scaler.update()
    assert scaler.get_scale() == 256.0
    assert all(state["step"] == 2 for state in scaled.state.values())
    assert_same(scaled, plain)


@names
def test_any_factor_divides(name: str, asked: dict[str, Any]) -> None:
    """Factors that are no powers of two; as torch.amp.GradScaler.unscale_ rounds."""
    scaled, plain = build(name, asked), build(name, asked)
    for step, scale in enumerate((3.0, 0.7, 65536.0, 1e-3)):
        for index, (p, q) in enumerate(zip(held(scaled), held(plain), strict=True)):
            p.grad = gradient(tuple(p.shape), p.dtype, 100 * step + index)
            q.grad = p.grad * torch.tensor(scale).double().reciprocal().float()
        scaled.grad_scale, scaled.found_inf = torch.tensor(scale), torch.tensor(0.0)
        scaled.step()
        del scaled.grad_scale, scaled.found_inf
        plain.step()
    assert_same(scaled, plain)


@names
@pytest.mark.parametrize("claims", [True, False])
def test_unscaled_and_clipped_gradients(name: str, claims: bool, asked: dict[str, Any]) -> None:
    """The ordinary way, where a claim only leaves the decision to skip to the optimizer."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaled, plain = build(name, asked), build(name, asked)
    if claims:
        claim(scaled)
    for step in range(3):
        backward(scaled, step, scaler)
        backward(plain, step, None)
        scaler.unscale_(scaled)
        for optimizer in (scaled, plain):
            nn.utils.clip_grad_norm_(held(optimizer), 0.5)
        scaler.step(scaled)
        scaler.update()
        plain.step()
    assert_same(scaled, plain)
    backward(scaled, 9, scaler)
    held(scaled)[0].grad[5] = float("inf")
    before = snapshot(scaled)
    scaler.unscale_(scaled)
    scaler.step(scaled)
    assert snapshot(scaled) == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["adam32bit", "lamb8bit"])
def test_16_bit_gradients_are_divided_in_float32(
    name: str, dtype: torch.dtype, asked: dict[str, Any]
) -> None:
    """As torch's fused optimizers do: what a scale saved from underflow must not be lost again."""
    scaled, plain = build(name, asked, dtype), build(name, asked, dtype)
    scale = 3 * 2.0**20
    for step in range(2):
        for index, (p, q) in enumerate(zip(held(scaled), held(plain), strict=True)):
            p.grad = gradient(tuple(p.shape), torch.float32, 100 * step + index).to(dtype)
            set_gradient(q, p.grad.float() * torch.tensor(scale).double().reciprocal().float())
        scaled.grad_scale, scaled.found_inf = torch.tensor(scale), torch.tensor(0.0)
        scaled.step()
        plain.step()
    assert_same(scaled, plain)
