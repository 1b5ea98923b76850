"""A small transformer of uneven matrices, sharded as engines shard it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)


class Layer(nn.Module):
    """Attention and two more matrices; tensor parallelism cuts the latter."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(90)
        self.qkv = nn.Linear(90, 270, bias=False)
        self.out = nn.Linear(90, 90, bias=False)
        self.up = nn.Linear(90, 252)
        self.down = nn.Linear(252, 90)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
        return x + self.down(torch.relu(self.up(x)))


class Transformer(nn.Module):
    """Two layers between a table and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(101, 90)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.head = nn.Linear(90, 101, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x)
        for layer in self.layers:
            h = layer(h)
        return self.head(h).square().mean()


def transformer() -> Transformer:
    torch.manual_seed(0)
    return Transformer()


def loss(model: nn.Module, seed: int) -> Tensor:
    data = torch.randint(0, 101, (4, 7), generator=torch.Generator().manual_seed(seed))
    return model(data)


def by_rows(mesh: Any) -> Transformer:
    model = transformer()
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)  # type: ignore[return-value]


def in_parallel(mesh: Any) -> Transformer:
    model = transformer()
    for layer in model.layers:
        parallelize_module(layer, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return model


def on_a_grid(mesh: Any) -> Transformer:
    model = in_parallel(mesh["tp"])
    for layer in model.layers:
        fully_shard(layer, mesh=mesh["dp"])
    return fully_shard(model, mesh=mesh["dp"])  # type: ignore[return-value]
