"""Sharded parameters beside the same ones in one process, and their states side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from optfactory import build_optimizer

# No multiples of 256, of rows that leave processes empty, and others.
SHAPES = [
    (101, 96),
    (250, 300),
    (3, 1700),
    (131,),
    (5000,),
    (65, 7),
    (9, 8, 80),
    (1, 5120),
    (7, 512),
]

Shape = tuple[int, ...]
Placements = tuple[Any, ...]


def values(shapes: Sequence[tuple[int, ...]], seed: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=generator) for shape in shapes]
    return [x.to(dtype) for x in made]


def cut(whole: Tensor, mesh: Any, placements: Placements) -> Tensor:
    return distribute_tensor(whole.clone(), mesh, placements)


def whole(value: Any) -> Any:
    if not isinstance(value, DTensor):
        return value
    if value.dtype == torch.int16:  # which gloo does not send
        return value.to(torch.int32).full_tensor().to(torch.int16)
    return value.full_tensor()


def by_rows(shape: tuple[int, ...]) -> Placements:
    return (Shard(0),)


def by_columns(shape: tuple[int, ...]) -> Placements:
    return (Shard(len(shape) - 1),)


def copied(shape: tuple[int, ...]) -> Placements:
    return (Replicate(),)


PLACEMENTS = {"rows": by_rows, "columns": by_columns, "copied": copied}


def state_of(optimizer: torch.optim.Optimizer) -> dict[tuple[int, str], Any]:
    state = optimizer.state_dict()["state"]
    return {(n, key): whole(x) for n, entries in state.items() for key, x in entries.items()}


def differences(sharded: Mapping[Any, Any], single: Mapping[Any, Any]) -> list[Any]:
    """Keys whose values are not the same bits."""
    assert sharded.keys() == single.keys(), (sharded.keys(), single.keys())
    return [
        k
        for k, v in single.items()
        if not torch.equal(torch.as_tensor(sharded[k]), torch.as_tensor(v))
    ]


def stepped(
    parameters: Sequence[nn.Parameter],
    gradients: Sequence[Sequence[Tensor]],
    name: str,
    options: Mapping[str, Any],
) -> torch.optim.Optimizer:
    """An optimizer after a step with each of these lists of gradients."""
    optimizer = build_optimizer(name, list(parameters), **options)
    for step in gradients:
        for p, g in zip(parameters, step, strict=True):
            p.grad = g
        optimizer.step()
    return optimizer


def compare(
    mesh: Any,
    placements: Mapping[tuple[int, ...], Placements] | Sequence[tuple[Shape, Placements]],
    name: str,
    options: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
    steps: int = 3,
) -> list[Any]:
    """Names of parameters and states that differ from those of one process, after some steps.

    Args:
        placements: of each shape; or shapes with theirs, where one is there several times.
    """
    pairs = list(placements.items() if isinstance(placements, Mapping) else placements)
    shapes, cuts = [shape for shape, _ in pairs], [places for _, places in pairs]
    start = values(shapes, 1, dtype)
    gradients = [values(shapes, 10 + n, dtype) for n in range(steps)]
    single = [nn.Parameter(x.clone()) for x in start]

    def spread(wholes: Sequence[Tensor]) -> list[Tensor]:
        return [cut(x, mesh, places) for x, places in zip(wholes, cuts, strict=True)]

    sharded = [nn.Parameter(x) for x in spread(start)]
    one = stepped(single, gradients, name, options)
    many = stepped(sharded, [spread(step) for step in gradients], name, options)
    found = [
        shape
        for shape, a, b in zip(shapes, sharded, single, strict=True)
        if not torch.equal(whole(a), b)
    ]
    return [*found, *differences(state_of(many), state_of(one))]
