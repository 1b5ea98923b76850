"""Sharded parameters and their states are those of one process, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard

from tests.distributed.harness import PLACEMENTS, SHAPES, compare
from tests.distributed.processes import Processes, Team
from tests.families import NAMES, known_to
from tests.sampling import spread

OPTIONS = {
    "as it is": {},
    "tensor-wise": {"block_wise": False},
    "bitsandbytes": {"compat": "bitsandbytes", "min_8bit_size": 0, "trust_ratio": "clip"},
    "clipped": {"percentile_clipping": 5},
    "skips": {"nonfinite": "skip_step"},
    "small blocks": {"block_size": 64, "signed_map": "symmetric"},
}


def names_of(team: Team, names: list[str], kind: str) -> dict[str, list]:
    placements = {shape: PLACEMENTS[kind](shape) for shape in SHAPES}
    found = {name: compare(team.mesh, placements, name, {}) for name in names}
    return {name: wrong for name, wrong in found.items() if wrong}


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", PLACEMENTS)
def test_every_name(processes: Processes, world: int, kind: str) -> None:
    # Names of all families where shares are uneven; elsewhere those of each kind of work.
    names = spread(NAMES, 14) if world == 3 else ["adamw8bit", "lamb8bit", "lamb"]
    assert processes.run(names_of, world, names, kind) == [{}] * world


def options_of(team: Team, kind: str) -> dict[str, list]:
    placements = {shape: PLACEMENTS[kind](shape) for shape in SHAPES}
    wrong = {}
    cases = [("adamw8bit", title) for title in OPTIONS]
    cases += [("lamb8bit", title) for title in spread(list(OPTIONS), 5)]  # with norms
    for name, title in cases:
        found = compare(team.mesh, placements, name, known_to(name, OPTIONS[title]))
        wrong |= {f"{name} {title}": found} if found else {}
    return wrong


@pytest.mark.parametrize("kind", PLACEMENTS)
def test_every_option(processes: Processes, kind: str) -> None:
    assert processes.run(options_of, 3, kind) == [{}] * 3


def rounding_of(team: Team, kind: str) -> dict[str, list]:
    placements = {shape: PLACEMENTS[kind](shape) for shape in SHAPES}
    torch.manual_seed(team.rank)  # what processes draw for themselves must not matter
    found = {
        rounding: compare(
            team.mesh,
            placements,
            "adamw8bit",
            asked,
            torch.bfloat16,
        )
        for rounding, asked in {
            "stochastic": {"param_rounding": "stochastic", "seed": 5},
            "kahan": {"param_rounding": "kahan"},
            "split": {"master_weights": "split"},
            "fp32": {"master_weights": "fp32"},
        }.items()
    }
    return {rounding: wrong for rounding, wrong in found.items() if wrong}


@pytest.mark.parametrize("kind", PLACEMENTS)
def test_rounding_of_16_bit_parameters(processes: Processes, kind: str) -> None:
    assert processes.run(rounding_of, 3, kind) == [{}] * 3


def on_a_grid(team: Team, names: list[str]) -> dict[str, list]:
    grids = {
        "hsdp": {shape: (Replicate(), Shard(0)) for shape in SHAPES},
        "tp": {shape: (Replicate(), Shard(len(shape) - 1)) for shape in SHAPES},
        "both": {shape: (Shard(0), Shard(len(shape) - 1)) for shape in SHAPES if len(shape) > 1},
        "inner": {(6, 12, 100): (Shard(0), Shard(2)), (6, 8, 128): (Shard(1), Shard(2))},
    }
    mesh = team.meshes[2, 2]
    found = {
        f"{name} {grid}": compare(mesh, placements, name, {})
        for name in names
        for grid, placements in grids.items()
    }
    return {title: wrong for title, wrong in found.items() if wrong}


def test_meshes_of_two_dimensions(processes: Processes) -> None:
    names = ["adamw8bit", "adamw", "lamb8bit", "lamb"]
    assert processes.run(on_a_grid, 4, names) == [{}] * 4


def with_the_portable_backend(team: Team) -> dict[str, list]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPTFACTORY_BACKEND", "reference")
        return names_of(team, ["adamw8bit", "lamb8bit"], "rows")


def test_the_portable_backend(processes: Processes) -> None:
    assert processes.run(with_the_portable_backend, 3) == [{}] * 3
