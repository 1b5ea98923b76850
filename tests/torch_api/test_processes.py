"""Optimizers, parameters and state shared with other processes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from optfactory import build_optimizer

NAMES = ["adam", "adam8bit", "lamb8bit", "paged_adam8bit"]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(80, 300), nn.Linear(300, 400), nn.Linear(400, 1))


def train(module: nn.Module, optimizer: Any, steps: int) -> float:
    loss = torch.zeros(())
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        loss = module(torch.randn(16, 80)).square().mean()
        loss.backward()
        optimizer.step()
    return loss.item()


def work(module: nn.Module, optimizer: Any, kind: str, file: str) -> None:
    torch.set_num_threads(1)
    if kind == "own":
        optimizer = build_optimizer(optimizer, module, lr=1e-3)
    loss = train(module, optimizer, 30)
    Path(file).write_text(str(loss))


@pytest.mark.parametrize("kind", ["own", "sent"])
@pytest.mark.parametrize("name", NAMES)
def test_processes_that_train_the_same_parameters_end_well(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hogwild: each with an optimizer of its own, or all with one that was sent to them."""
    monkeypatch.setattr("optfactory.memory.placement.PAGED_MIN_NUMEL", 1000)
    module = model()
    module.share_memory()
    optimizer = build_optimizer(name, module, lr=1e-3)
    train(module, optimizer, 1)
    context = mp.get_context("spawn")
    given = name if kind == "own" else optimizer
    files = [str(tmp_path / f"{index}") for index in range(2)]
    workers = [context.Process(target=work, args=(module, given, kind, file)) for file in files]
    for worker in workers:
        worker.start()
    train(module, optimizer, 10)
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    assert all(math.isfinite(float(Path(file).read_text())) for file in files)


def receive(queue: Any, file: str) -> None:
    received = queue.get()
    total = sum(t.float().sum().item() for e in received["state"].values() for t in e.values())
    Path(file).write_text(str(total))


@pytest.mark.parametrize("name", NAMES)
def test_a_state_dict_sent_to_a_writer_leaves_training_as_it_was(name: str, tmp_path: Path) -> None:
    module, twin = model(), model()
    optimizer, expected = (build_optimizer(name, m, lr=1e-3) for m in (module, twin))
    context = mp.get_context("spawn")
    queue = context.Queue()
    train(module, optimizer, 3)
    train(twin, expected, 3)
    writer = context.Process(target=receive, args=(queue, str(tmp_path / "sum")))
    writer.start()
    queue.put(optimizer.state_dict())
    writer.join(120)
    assert writer.exitcode == 0
    train(module, optimizer, 3)
    train(twin, expected, 3)
    for p, q in zip(module.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
        for key, value in optimizer.state[p].items():
            assert torch.equal(value, expected.state[q][key])
