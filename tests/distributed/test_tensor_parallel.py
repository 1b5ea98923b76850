"""Tensor parallelism, alone and with FSDP2, beside the same training in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from tests.distributed.beside import CASES, Beside, small_pages
from tests.distributed.nets import net, tensor_parallel_fsdp
from tests.distributed.processes import Processes, Team


class Block(nn.Module):
    """What a language model is made of; its columns end inside blocks, and its rows are uneven."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(101, 96)
        self.norm = nn.LayerNorm(96)
        self.up = nn.Linear(96, 252)
        self.down = nn.Linear(252, 96)
        self.last = nn.LayerNorm(96)
        self.head = nn.Linear(96, 101, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x)
        h = h + self.down(torch.relu(self.up(self.norm(h))))
        return self.head(self.last(h)).square().mean()


def block() -> Block:
    torch.manual_seed(0)
    return Block()


def loss(model: nn.Module, seed: int) -> Tensor:
    data = torch.randint(0, 101, (4, 8), generator=torch.Generator().manual_seed(seed))
    return model(data)


def in_parallel(mesh: Any) -> Block:
    model = block()
    parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return model


def in_sequence(mesh: Any) -> Block:
    """Each process has a part of the sequence too, where it has no part of a matrix."""
    model = block()
    plan = {
        "table": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Shard(1)),
        "last": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    parallelize_module(model, mesh, plan)
    return model


def train(team: Team, case: str) -> dict[str, list[str]]:
    name, options = CASES[case]
    found = {}
    for engine in (in_parallel, in_sequence):
        with small_pages():
            both = Beside.of(engine(team.mesh), name, block(), loss=loss, **options)
            both.train(range(3), 0, 1)
        found[engine.__name__] = both.wrong
    return {title: wrong for title, wrong in found.items() if wrong}


@pytest.mark.parametrize("case", CASES)
def test_every_case(processes: Processes, case: str) -> None:
    for world in (2, 4) if case in ("adamw8bit", "lamb8bit") else (2,):
        assert processes.run(train, world, case) == [{}] * world


def unsummed(team: Team) -> list[str]:
    model = in_sequence(team.mesh)
    loss(model, 0).backward()
    return [
        name
        for name, p in model.named_parameters()
        if isinstance(p.grad, DTensor) and any(x.is_partial() for x in p.grad.placements)
    ]


def test_gradients_of_norms_are_parts_of_sums(processes: Processes) -> None:
    """Or the tests above would say less than they do."""
    for found in processes.run(unsummed, 2):
        assert {"norm.weight", "norm.bias", "last.weight", "last.bias"} <= set(found)


def with_fsdp(mesh: Any) -> Block:
    model = in_sequence(mesh["tp"])
    for module in (model.norm, model.up, model.down):
        fully_shard(module, mesh=mesh["dp"])
    return fully_shard(model, mesh=mesh["dp"])  # type: ignore[return-value]


def on_a_grid(team: Team, case: str) -> dict[str, list[str]]:
    name, options = CASES[case]
    mesh = team.meshes[2, 2]
    single = net()
    single.norm = nn.Identity()
    rows = Beside.of(tensor_parallel_fsdp(mesh), name, single, **options)
    rest = Beside.of(with_fsdp(mesh), name, block(), loss=loss, **options)
    assert len(rows.model.up.weight.placements) == 2
    found = {
        title: both.train(range(3), team.rank // 2, 2).wrong
        for title, both in (("rows", rows), ("sequences", rest))
    }
    return {title: wrong for title, wrong in found.items() if wrong}


@pytest.mark.parametrize("case", ["adamw", "adamw8bit", "lamb8bit", "clipped", "skips"])
def test_with_fsdp2_on_a_grid(processes: Processes, case: str) -> None:
    assert processes.run(on_a_grid, 4, case) == [{}] * 4
