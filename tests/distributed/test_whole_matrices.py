"""Matrices of which processes hold parts are made orthogonal as wholes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard

from tests.distributed.harness import PLACEMENTS, compare
from tests.distributed.processes import Processes, Team

pytestmark = pytest.mark.filterwarnings("ignore:the parameters have no names")

# Several of a shape, tall ones and wide ones, rows that leave processes empty, stacks, and vectors
# for the other optimizer.
SHAPES = [(101, 96), (96, 252), (3, 700), (96, 252), (131,), (5, 24, 80), (65, 7), (96, 252)]


def of_all(team: Team, names: list[str], kind: str) -> dict[str, list]:
    placements = {shape: PLACEMENTS[kind](shape) for shape in SHAPES}
    found = {name: compare(team.mesh, placements, name, {}) for name in names}
    return {name: wrong for name, wrong in found.items() if wrong}


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", PLACEMENTS)
def test_every_world(processes: Processes, world: int, kind: str) -> None:
    assert processes.run(of_all, world, ["muon8bit", "muon32bit"], kind) == [{}] * world
