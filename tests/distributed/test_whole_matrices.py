"""Matrices of which processes hold parts are made orthogonal as wholes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard

from tests.distributed.harness import PLACEMENTS, compare
from tests.distributed.processes import Processes, Team
from tests.sampling import spread as sample

pytestmark = pytest.mark.filterwarnings("ignore:the parameters have no names")

# Several of a shape, tall ones and wide ones, rows that leave processes empty, stacks, and vectors
# for the other optimizer.
SHAPES = [(101, 96), (96, 252), (3, 700), (96, 252), (131,), (5, 24, 80), (65, 7), (96, 252)]


OPTIONS: dict[str, dict[str, Any]] = {
    "split": {"split": 3},
    "original": {"adjust_lr": "original", "nesterov": False, "ns_coefficients": "polar_express"},
    "clipped": {"percentile_clipping": 5},
    "skips": {"nonfinite": "skip_step"},
    "tensor-wise": {"block_wise": False},
    "much memory": {"ns_memory": 10**7},
    "little memory": {"ns_memory": 1},
    "nearest": {"state_rounding": "nearest"},
}


def spread(kind: str, shapes: list[Any] = SHAPES) -> list[Any]:
    return [(shape, PLACEMENTS[kind](shape)) for shape in shapes]


def of_all(team: Team) -> dict[str, list]:
    found = {
        f"{name} {kind}": compare(team.mesh, spread(kind), name, {})
        for name in ("muon8bit", "muon32bit")
        for kind in PLACEMENTS
    }
    return {title: wrong for title, wrong in found.items() if wrong}


@pytest.mark.parametrize("world", [4, 3, 2, 1])
def test_every_world(processes: Processes, world: int) -> None:
    assert processes.run(of_all, world) == [{}] * world


def with_options(team: Team, kind: str, titles: list[str]) -> dict[str, list]:
    shapes = [shape for shape in SHAPES if len(shape) == 1 or shape[-2] % 3 == 0]
    found = {
        title: compare(team.mesh, spread(kind, shapes), "muon8bit", OPTIONS[title])
        for title in titles
    }
    return {title: wrong for title, wrong in found.items() if wrong}


@pytest.mark.parametrize("kind", ["rows", "columns"])
def test_every_option(processes: Processes, kind: str) -> None:
    titles = sample(list(OPTIONS), 3)
    assert processes.run(with_options, 3, kind, titles) == [{}] * 3


EXPERTS = [((5, 24, 80), (Shard(0),)), ((1, 24, 80), (Shard(0),)), ((2, 24, 80), (Shard(1),))]


def normalised(team: Team, kinds: list[str]) -> dict[str, list]:
    """Rows by their second moments, which all processes keep: of experts that one has whole too."""
    found = {
        f"{name} {kind}": compare(team.mesh, spread(kind), name, {"neuron_norm": True})
        for name in ("muon8bit", "muon32bit")
        for kind in kinds
    }
    split = {"neuron_norm": True, "neuron_beta": 0.5, "split": 3, "ns_memory": 10**7}
    found["experts"] = compare(team.mesh, EXPERTS, "muon32bit", split)
    if team.world == 4:
        pairs = [((6, 24, 80), (Shard(0), Shard(1)))] * 2 + [((5, 24, 80), (Shard(0),) * 2)]
        pairs += [((101, 96), (Replicate(), Shard(0))), ((3, 2, 80), (Shard(0), Replicate()))]
        options = {"neuron_norm": True}
        found["grid"] = compare(team.meshes[2, 2], pairs, "muon32bit", options)
    return {title: wrong for title, wrong in found.items() if wrong}


@pytest.mark.parametrize("world", [2, 4])
def test_second_moments_of_neurons(processes: Processes, world: int) -> None:
    kinds = sample(list(PLACEMENTS), 2)
    assert processes.run(normalised, world, kinds) == [{}] * world


def rounded(team: Team, kind: str) -> dict[str, list]:
    torch.manual_seed(team.rank)  # what processes draw for themselves must not matter
    asked = {
        "stochastic": {"param_rounding": "stochastic", "seed": 5},
        "kahan": {"param_rounding": "kahan"},
    }
    found = {
        title: compare(team.mesh, spread(kind), "muon8bit", options, torch.bfloat16)
        for title, options in asked.items()
    }
    return {title: wrong for title, wrong in found.items() if wrong}


@pytest.mark.parametrize("kind", ["rows", "columns"])
def test_rounding_of_16_bit_parameters(processes: Processes, kind: str) -> None:
    assert processes.run(rounded, 3, kind) == [{}] * 3


def on_a_grid(team: Team) -> dict[str, list]:
    grids = {
        "hsdp": [(shape, (Replicate(), Shard(0))) for shape in SHAPES],
        "tp": [(shape, (Replicate(), Shard(len(shape) - 1))) for shape in SHAPES],
        "both": [(shape, (Shard(0), Shard(len(shape) - 1))) for shape in SHAPES if len(shape) > 1],
        "experts": [((6, 24, 80), (Shard(0), Shard(1)))] * 2 + [((5, 24, 80), (Shard(0),) * 2)],
    }
    found = {
        f"{name} {grid}": compare(team.meshes[2, 2], pairs, name, {})
        for name in ("muon8bit", "muon32bit")
        for grid, pairs in grids.items()
    }
    flat = [((6, 4, 3, 3), (Shard(0), Shard(2))), ((6, 4, 3, 3), (Shard(1), Shard(0)))]
    found["flat"] = compare(team.meshes[2, 2], flat, "muon32bit", {"flatten": True})
    return {title: wrong for title, wrong in found.items() if wrong}


def test_meshes_of_two_dimensions(processes: Processes) -> None:
    assert processes.run(on_a_grid, 4) == [{}] * 4
