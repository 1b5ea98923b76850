"""What surrounds an optimizer: hooks, scalers, clipping, copies, optimizers in backward."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from optfactory import Optimizer2State, build_optimizer
from optfactory.errors import ConfigError
from tests.torch_api.harness import (
    assert_same_training,
    bits,
    held,
    is_paged,
    parameters,
    snapshot,
    train,
    weight,
)

# ---- hooks ----------------------------------------------------------------------------------


def test_step_hooks_run_around_the_update() -> None:
    p = weight()
    optimizer = build_optimizer("adam", [p])
    seen: list[Any] = []

    def before(which: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert which is optimizer
        seen.append(("before", p[0].item()))

    def after(which: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert which is optimizer
        seen.append(("after", p[0].item()))

    handles = [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert [what for what, _ in seen] == ["before", "after"]
    assert seen[0][1] == 1.0 > seen[1][1]
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert len(seen) == 2


def test_global_step_hooks_run_too() -> None:
    p = weight()
    optimizer = build_optimizer("lamb", [p])
    seen: list[Optimizer] = []
    handle = register_optimizer_step_post_hook(lambda which, args, kwargs: seen.append(which))
    try:
        p.grad = torch.ones_like(p)
        optimizer.step()
    finally:
        handle.remove()
    assert seen == [optimizer]


def test_state_dict_hooks_see_and_change_what_is_saved() -> None:
    optimizer = build_optimizer("adam8bit", [weight(70, 80)])
    train(optimizer, range(1))
    seen = []
    optimizer.register_state_dict_pre_hook(lambda which: seen.append("pre"))
    optimizer.register_state_dict_post_hook(lambda which, saved: {**saved, "note": "mine"})
    saved = optimizer.state_dict()
    assert seen == ["pre"]
    assert saved["note"] == "mine"
    assert set(saved) == {"state", "param_groups", "note"}


def test_load_state_dict_hooks_see_and_change_what_is_loaded() -> None:
    source = build_optimizer("adam8bit", [weight(70, 80)], lr=0.5)
    train(source, range(2))
    wrapped = {"inner": source.state_dict()}
    target = build_optimizer("adam8bit", [weight(70, 80)])
    seen: list[Any] = []

    def unwrap(which: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
        assert which is target
        return saved["inner"]

    def loaded(which: Optimizer) -> None:
        seen.append(which.param_groups[0]["lr"])

    target.register_load_state_dict_pre_hook(unwrap)
    target.register_load_state_dict_post_hook(loaded)
    target.load_state_dict(wrapped)
    assert seen == [0.5]
    assert set(wrapped) == {"inner"}
    assert target.state[held(target)[0]]["step"] == 2


# ---- what surrounds an optimizer ------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "adam8bit", "lamb"])
def test_a_gradient_scaler_unscales_and_skips(name: str, backend: str) -> None:
    scaler = torch.amp.GradScaler(torch.get_default_device().type, init_scale=1024.0)
    p, expected = weight(70, 80), weight(70, 80)
    optimizer, plain = build_optimizer(name, [p]), build_optimizer(name, [expected])
    for step in range(3):
        for parameter in (p, expected):
            parameter.grad = None
        scaler.scale((p * (step + 1)).sum()).backward()
        (expected * (step + 1)).sum().backward()
        scaler.unscale_(optimizer)
        norms = [float(nn.utils.clip_grad_norm_([q], 0.5)) for q in (p, expected)]
        assert norms[0] == pytest.approx(norms[1])
        scaler.step(optimizer)
        scaler.update()
        plain.step()
    assert bits(p) == bits(expected)
    before = snapshot(optimizer)
    scaler.scale((p * torch.inf).sum()).backward()
    assert scaler.step(optimizer) is None
    scaler.update()
    assert snapshot(optimizer) == before
    assert scaler.get_scale() == 512.0


def test_a_gradient_scaler_finds_no_claim_to_scale_inside() -> None:
    # With this attribute a GradScaler leaves unscaling and skipping to the optimizer.
    assert not getattr(build_optimizer("adam", [weight()]), "_step_supports_amp_scaling", False)


def test_clipped_gradients_are_used(backend: str) -> None:
    p = weight()
    optimizer = build_optimizer("adam", [p], betas=(0.0, 0.0), eps=1.0, lr=1.0)
    p.grad = torch.full_like(p, 100.0)
    nn.utils.clip_grad_norm_([p], max_norm=1.0)
    clipped = p.grad.clone()
    before = p.detach().clone()
    optimizer.step()
    torch.testing.assert_close(before - p.detach(), clipped / (clipped.abs() + 1))


@pytest.mark.parametrize("name", ["adam", "lamb8bit"])
def test_an_optimizer_in_the_backward_pass_trains_and_frees_gradients(
    name: str, backend: str
) -> None:
    def build() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(70, 64), nn.Tanh(), nn.Linear(64, 1))

    fused, plain = build(), build()
    optimizers = {p: build_optimizer(name, [p]) for p in fused.parameters()}

    def update(p: Tensor) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in fused.parameters():
        p.register_post_accumulate_grad_hook(update)
    optimizer = build_optimizer(name, plain)
    for _ in range(3):
        fused(torch.ones(5, 70)).sum().backward()
        optimizer.zero_grad()
        plain(torch.ones(5, 70)).sum().backward()
        optimizer.step()
    for p, q in zip(fused.parameters(), plain.parameters(), strict=True):
        assert p.grad is None
        assert bits(p) == bits(q)


def copied(optimizer: Optimizer2State) -> Optimizer2State:
    return copy.deepcopy(optimizer)


def pickled(optimizer: Optimizer2State) -> Optimizer2State:
    return pickle.loads(pickle.dumps(optimizer))


def saved_whole(optimizer: Optimizer2State) -> Optimizer2State:
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copied, pickled, saved_whole])
@pytest.mark.parametrize("name", ["adam", "adamw8bit", "paged_lamb8bit"])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_copy_is_independent_and_trains_on_the_same(
    duplicate: Callable[[Optimizer2State], Optimizer2State],
    name: str,
    steps: int,
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("optfactory.memory.placement.PAGED_MIN_NUMEL", 1000)
    optimizer = build_optimizer(name, parameters())
    train(optimizer, range(steps))
    before = snapshot(optimizer)
    other = duplicate(optimizer)
    assert type(other) is Optimizer2State
    assert other.config == optimizer.config
    train(other, range(steps, steps + 2))
    assert snapshot(optimizer) == before
    train(optimizer, range(steps, steps + 2))
    assert_same_training(optimizer, other)
    if name.startswith("paged_"):
        assert is_paged(other.state[held(other)[0]]["exp_avg_q8"])
    assert other.memory_report() == optimizer.memory_report()
    other.add_param_group({"params": [weight()]})
    assert len(optimizer.param_groups) == 1


def test_deepcopy_of_a_model_and_its_optimizer_keeps_them_together() -> None:
    model = nn.Linear(70, 64)
    optimizer = build_optimizer("adam8bit", model)
    model(torch.ones(1, 70)).sum().backward()
    optimizer.step()
    other, other_optimizer = copy.deepcopy((model, optimizer))
    assert held(other_optimizer)[0] is other.weight
    other(torch.ones(1, 70)).sum().backward()
    before = bits(model.weight)
    other_optimizer.step()
    assert bits(model.weight) == before != bits(other.weight)


def test_an_optimizer_and_its_state_are_freed_without_waiting_for_a_collection() -> None:
    p = weight(70, 80)
    optimizer = build_optimizer("adam", [p])
    train(optimizer, range(2))
    alive = weakref.ref(optimizer.state[p]["exp_avg"])
    gc.collect()
    gc.disable()
    try:
        del optimizer
        freed = alive() is None
    finally:
        gc.enable()
    gc.collect()
    assert alive() is None
    assert freed


def test_gradients_are_freed_by_zero_grad_after_a_step(backend: str) -> None:
    p = weight()
    optimizer = build_optimizer("adam", [p])
    for _ in range(2):
        p.grad = torch.ones_like(p)
        gradient = weakref.ref(p.grad)
        optimizer.step()
        optimizer.zero_grad()
        assert gradient() is None


def test_gradients_are_freed_also_after_a_failed_step(monkeypatch: pytest.MonkeyPatch) -> None:
    p = weight()
    optimizer = build_optimizer("adam", [p])
    monkeypatch.setenv("OPTFACTORY_BACKEND", "nonsense")
    p.grad = torch.ones_like(p)
    gradient = weakref.ref(p.grad)
    with pytest.raises(ConfigError):
        optimizer.step()
    optimizer.zero_grad()
    gc.collect()
    assert gradient() is None


# torch's own tracer looks at the gradient of every local variable, the loss too.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_training_step_trains_as_a_plain_one(backend: str) -> None:
    def losses(compiled: bool) -> list[float]:
        torch.manual_seed(0)
        model = nn.Linear(64, 128)
        optimizer = build_optimizer("adamw8bit", model, lr=0.01)
        inputs = torch.randn(4, 64)

        def step() -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = model(inputs).square().mean()
            loss.backward()
            optimizer.step()
            return loss

        run = torch.compile(step, backend="eager") if compiled else step
        return [run().item() for _ in range(3)]

    assert losses(compiled=True) == losses(compiled=False)
