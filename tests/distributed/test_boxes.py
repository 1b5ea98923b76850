"""What real DTensors hold, on one to four processes, is what their box says."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import _StridedShard

from optfactory import build_optimizer
from optfactory.errors import ConfigError
from optfactory.sharding.dtensors import Sharding
from tests.distributed.processes import Processes, Team

SHAPES = [(1,), (5,), (3, 2), (8, 6), (250, 7), (2, 3, 5)]


def numbered(shape: tuple[int, ...]) -> Tensor:
    return torch.arange(math.prod(shape), dtype=torch.float32).view(shape)


def problems_of(name: str, tensor: Any, whole: Tensor) -> list[str]:
    """What differs between a DTensor and its box."""
    sharding = Sharding.of(tensor)
    assert sharding is not None
    found, local = sharding.box, tensor.to_local().detach()
    torchs = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    case = f"{name} {tuple(whole.shape)} {tensor.placements}"
    problems = []
    if found.sizes != tuple(local.shape) or found.sizes != torchs[0]:
        problems.append(f"{case}: sizes {found.sizes}, {tuple(local.shape)}, {torchs[0]}")
    elif found.numel and found.offsets != torchs[1]:
        problems.append(f"{case}: offsets {found.offsets}, {torchs[1]}")
    elif not torch.equal(local, whole[found.slices]):
        problems.append(f"{case}: other values at {found}")
    return problems


def distributed(mesh: DeviceMesh) -> list[str]:
    problems = []
    for shape in SHAPES:
        kinds = [Replicate(), *map(Shard, range(len(shape)))]
        for placements in itertools.product(kinds, repeat=mesh.ndim):
            tensor = distribute_tensor(numbered(shape), mesh, placements, src_data_rank=None)
            problems += problems_of("distributed", tensor, numbered(shape))
    return problems


class Net(nn.Module):
    def __init__(self, rows: int) -> None:
        super().__init__()
        self.first = nn.Linear(6, rows)
        self.second = nn.Linear(rows, 5)
        self.norm = nn.LayerNorm(5)
        for p in self.parameters():
            p.data = numbered(tuple(p.shape))


def by_engines(mesh: DeviceMesh, rows: int) -> list[str]:
    """A model that fully_shard has cut, after parallelize_module on two dimensions."""
    model = Net(rows)
    whole = {name: p.detach().clone() for name, p in model.named_parameters()}
    if mesh.ndim == 2:
        plan = {"first": ColwiseParallel(), "second": RowwiseParallel()}
        parallelize_module(model, mesh["tp"], plan, src_data_rank=None)
    fully_shard(model, mesh=mesh if mesh.ndim == 1 else mesh["dp"])
    found = [problems_of("engines", p, whole[name]) for name, p in model.named_parameters()]
    return [problem for problems in found for problem in problems]


def in_pieces(mesh: DeviceMesh) -> list[str]:
    """A parameter of which ranks hold every other part, as no engine leaves it."""
    placements = (_StridedShard(0, split_factor=2), Replicate())
    tensor = nn.Parameter(Sharding((8, 64), mesh, placements).wrap(torch.zeros(4, 64)))
    try:
        build_optimizer("adamw", [("p", tensor)])
    except ConfigError as error:
        return [] if "whose parts are in pieces: split_factor 2" in str(error) else [str(error)]
    return ["was accepted"]


def work(team: Team) -> dict[str, list[str]]:
    problems = {}
    for size in range(1, team.world + 1):
        mesh = team.meshes[size,]
        if team.rank < size:
            problems[f"{size}"] = distributed(mesh)
            for rows in (1, 5, 8, 250):
                problems[f"{size}, fsdp, {rows}"] = by_engines(mesh, rows)
        else:
            outside = Sharding((4, 4), mesh, (Shard(0),))
            problems[f"{size}"] = [] if outside.box.sizes == (0, 0) else ["outside"]
    mesh = team.meshes[2, 2]
    problems["2x2"] = distributed(mesh)
    for rows in (2, 3, 5, 6, 10, 250, 251):
        problems[f"2x2, tp, {rows}"] = by_engines(mesh, rows)
    hsdp = Net(7)
    whole = {name: p.detach().clone() for name, p in hsdp.named_parameters()}
    fully_shard(hsdp, mesh=mesh)
    found = [problems_of("hsdp", p, whole[name]) for name, p in hsdp.named_parameters()]
    problems["2x2, hsdp"] = [problem for part in found for problem in part]
    problems["in pieces"] = in_pieces(mesh)
    return problems


def test_every_rank_holds_its_box(processes: Processes) -> None:
    for found in processes.run(work, 4):
        assert {"1", "2", "3", "4", "2x2", "2x2, tp, 251", "2x2, hsdp", "in pieces"} <= found.keys()
        assert not {case: problems for case, problems in found.items() if problems}
