"""A model of uneven shapes, sharded as engines shard it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)


class Net(nn.Module):
    """Widths that are no multiples of 256, rows that leave processes empty, one tensor for two."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(101, 96)
        self.up = nn.Linear(96, 250)
        self.norm = nn.LayerNorm(250)
        self.down = nn.Linear(250, 96, bias=False)
        self.few = nn.Linear(96, 3)
        self.head = nn.Linear(96, 101, bias=False)
        self.head.weight = self.table.weight
        self.frozen = nn.Parameter(torch.ones(70, 70), requires_grad=False)
        self.unused = nn.Linear(96, 64)

    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x)
        h = h + self.down(self.norm(torch.relu(self.up(h))))
        return self.head(h).square().mean() + self.few(h).sin().mean()


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def fsdp(mesh: Any, **options: Any) -> Net:
    model = net()
    for module in (model.up, model.norm, model.down, model.few):
        fully_shard(module, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)  # type: ignore[return-value]


def tensor_parallel_fsdp(mesh: Any) -> Net:
    """TP over the second dimension of a mesh, FSDP2 over the first."""
    model = net()
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    model.norm = nn.Identity()  # it would need the whole of what `up` gives in parts
    parallelize_module(model, mesh["tp"], plan)
    for module in (model.up, model.down, model.few):
        fully_shard(module, mesh=mesh["dp"])
    return fully_shard(model, mesh=mesh["dp"])  # type: ignore[return-value]


def inputs(seed: int) -> Tensor:
    return torch.randint(0, 101, (4, 7), generator=torch.Generator().manual_seed(seed))


def backward(model: nn.Module, seed: int) -> None:
    model.zero_grad()
    model(inputs(seed)).backward()


def same_gradients(model: nn.Module, single: nn.Module, seed: int) -> None:
    """Give a model the gradients of another, plain one, which no sum over processes rounded."""
    backward(single, seed)
    for sharded, p in zip(model.parameters(), single.parameters(), strict=True):
        sharded.grad = None
        if p.grad is not None and isinstance(sharded, DTensor):
            sharded.grad = distribute_tensor(p.grad, sharded.device_mesh, sharded.placements)
        elif p.grad is not None:
            sharded.grad = p.grad.clone()
