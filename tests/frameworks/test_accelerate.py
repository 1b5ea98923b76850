"""Hugging Face accelerate: prepare, accumulate, clip, save_state and load_state."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from optfactory import build_optimizer
from tests.frameworks.harness import (
    NAMES,
    SAMPLE,
    assert_close,
    assert_kept_as_named,
    batches,
    loss_of,
    network,
    one_cycle,
    rate_of,
    weights,
)
from tests.torch_api.harness import assert_same_training

accelerate = pytest.importorskip("accelerate")
from accelerate.state import AcceleratorState, GradientState  # noqa: E402


@pytest.fixture(autouse=True)
def _own_state() -> Iterator[None]:
    """Accelerators share their settings within a process; the package's own tests reset them so."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Run(NamedTuple):
    accelerator: Any
    model: nn.Module
    optimizer: Any
    losses: list[float]


def run(
    make: Any,
    epochs: range,
    load: Path | None = None,
    precision: str = "no",
    dtype: torch.dtype = torch.float32,
) -> Run:
    """Epochs of eight batches, which are four updates, in accelerate's documented loop."""
    accelerator = accelerate.Accelerator(
        cpu=True, gradient_accumulation_steps=2, mixed_precision=precision
    )
    model = network().to(dtype)
    optimizer = make(model)
    schedule = one_cycle(optimizer)
    data = DataLoader(torch.cat(batches()).to(dtype), batch_size=4)
    model, optimizer, schedule, data = accelerator.prepare(model, optimizer, schedule, data)
    if load is not None:
        accelerator.load_state(str(load))
    losses = []
    for _ in epochs:
        for batch in data:
            with accelerator.accumulate(model):
                loss = loss_of(model, batch)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            losses.append(loss.item())
    return Run(accelerator, model, optimizer, losses)


def assert_resumes(make: Any, folder: Path, **given: Any) -> Run:
    whole = run(make, range(2), **given)
    first = run(make, range(1), **given)
    first.accelerator.save_state(str(folder))
    rest = run(make, range(1, 2), load=folder, **given)
    assert whole.losses[-1] < whole.losses[0]
    assert first.losses + rest.losses == whole.losses
    assert weights(rest.model) == weights(whole.model)
    return rest


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_state_is_loaded_and_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    rest = assert_resumes(lambda model: build_optimizer(name, model, lr=rate_of(name)), tmp_path)
    assert_kept_as_named(rest.optimizer, name)
    assert {entries["step"].item() for entries in rest.optimizer.state.values()} == {8}


def test_a_bfloat16_model_goes_on_bit_for_bit(tmp_path: Path) -> None:
    def make(model: nn.Module) -> Optimizer:
        return build_optimizer("adamw8bit", model, lr=0.01, param_rounding="kahan")

    assert_resumes(make, tmp_path, dtype=torch.bfloat16)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_loop_acts_as_on_torchs_adamw(precision: str) -> None:
    ours = run(lambda m: build_optimizer("adamw", m), range(2), precision=precision)
    theirs = run(lambda m: torch.optim.AdamW(m.parameters()), range(2), precision=precision)
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-5 if precision == "no" else 1e-2)
    assert_close(ours.model, theirs.model, rtol=1e-4 if precision == "no" else 1e-2)


@pytest.mark.parametrize("name", SAMPLE)
def test_preparing_an_optimizer_that_has_stepped_keeps_its_state(name: str) -> None:
    model, other = network(), network()
    optimizer, plain = build_optimizer(name, model), build_optimizer(name, other)
    for net, which in ((model, optimizer), (other, plain)):
        loss_of(net, batches()[0]).backward()
        which.step()
    prepared = accelerate.Accelerator(cpu=True).prepare(optimizer)
    assert prepared.optimizer is optimizer
    assert_same_training(optimizer, plain)
    assert_kept_as_named(optimizer, name)
