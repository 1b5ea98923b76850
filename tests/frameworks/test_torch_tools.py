"""Tools of torch around a training loop that tests/torch_api does not have."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import state_dict as checkpoint_state

from optfactory import Optimizer2State, build_optimizer
from optfactory.errors import ConfigError
from tests.frameworks.harness import (
    NAMES,
    SAMPLE,
    assert_close,
    assert_kept_as_named,
    batches,
    loss_of,
    network,
    weights,
)
from tests.torch_api.harness import through_file


def train(model: nn.Module, optimizer: Optimizer2State, steps: range = range(3)) -> list[float]:
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(model, batches()[step])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", ["adam", "adamw8bit", "lamb"])
def test_gradients_accumulate_over_parts_of_a_batch(name: str) -> None:
    whole, parts = network(), network()
    optimizers = [build_optimizer(name, model, lr=0.01, eps=1e-3) for model in (whole, parts)]
    for batch in batches(4):
        loss_of(whole, batch).backward()
        for part in batch.split(1):
            (loss_of(parts, part) / len(batch)).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert_close(parts, whole, rtol=1e-3 if name == "adamw8bit" else 1e-4)


@pytest.mark.parametrize("name", SAMPLE)
def test_a_compiled_model_trains_and_shares_checkpoints_with_the_plain_one(name: str) -> None:
    model = network()
    whole = train(model, build_optimizer(name, model), range(6))

    plain, inner = network(), network()
    compiled: Any = torch.compile(inner, backend="eager")
    one, other = build_optimizer(name, plain), build_optimizer(name, compiled)
    assert train(compiled, other) == train(plain, one)
    # torch.compile prefixes the names of parameters; checkpoints go both ways nevertheless.
    saved, saved_compiled = (through_file(which.state_dict()) for which in (one, other))
    one, other = build_optimizer(name, plain), build_optimizer(name, compiled)
    one.load_state_dict(saved_compiled)
    other.load_state_dict(saved)
    losses = train(plain, one, range(3, 6))
    assert losses == train(compiled, other, range(3, 6))
    assert losses == whole[3:]
    assert weights(inner) == weights(plain)
    assert_kept_as_named(other, name)


@pytest.mark.parametrize("name", NAMES)
def test_state_by_parameter_names_as_distributed_checkpoints_have_it(name: str) -> None:
    model = network()
    optimizer = build_optimizer(name, model, lr=0.01, weight_decay=0.1)
    before = weights(model)
    # Without state yet, this takes a step with lr 0 and gradients of 0 to allocate it.
    checkpoint_state.get_optimizer_state_dict(model, optimizer)
    assert weights(model) == before
    assert optimizer.param_groups[0]["lr"] == 0.01

    train(model, optimizer)
    saved = through_file(checkpoint_state.get_optimizer_state_dict(model, optimizer))
    assert saved["state"].keys() == dict(model.named_parameters()).keys()
    other = copy.deepcopy(model)
    resumed = build_optimizer(name, other, lr=0.5)
    checkpoint_state.set_optimizer_state_dict(other, resumed, saved)
    assert_kept_as_named(resumed, name)
    assert train(other, resumed, range(3, 6)) == train(model, optimizer, range(3, 6))
    assert weights(other) == weights(model)


def test_a_flat_state_by_parameter_names_is_loaded_too() -> None:
    model = network()
    optimizer = build_optimizer("adamw8bit", model, lr=0.01)
    train(model, optimizer)
    flat = checkpoint_state.StateDictOptions(flatten_optimizer_state_dict=True)
    saved = checkpoint_state.get_optimizer_state_dict(model, optimizer, options=flat)
    assert "state.0.weight.exp_avg_q8" in saved
    other = copy.deepcopy(model)
    resumed = build_optimizer("adamw8bit", other)
    checkpoint_state.set_optimizer_state_dict(other, resumed, saved, options=flat)
    assert train(other, resumed, range(3, 6)) == train(model, optimizer, range(3, 6))


@pytest.mark.parametrize("handles_scale", [False, True])
def test_a_closure_that_a_grad_scaler_passes_on_is_refused(handles_scale: bool) -> None:
    p = torch.ones(300, requires_grad=True)
    optimizer = build_optimizer("adam", [p])
    optimizer._step_supports_amp_scaling = handles_scale
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def closure() -> float:
        raise AssertionError("not called")

    scaler.scale(p.sum()).backward()
    with pytest.raises(ConfigError, match="a closure cannot be combined with a GradScaler"):
        scaler.step(optimizer, closure)
    assert not optimizer.state
    assert torch.equal(p, torch.ones(300))


def test_a_grad_scaler_that_is_off_passes_closures_on() -> None:
    p = torch.ones(300, requires_grad=True)
    optimizer = build_optimizer("adam", [p])
    scaler = torch.amp.GradScaler("cpu", enabled=False)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = p.sum()
        loss.backward()
        return loss

    assert scaler.step(optimizer, closure) == 300
    assert (p < 1).all()
