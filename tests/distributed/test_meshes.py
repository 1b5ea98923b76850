"""Parameters of one optimizer on different meshes, and optimizers of some processes only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from optfactory import build_optimizer
from tests.distributed.beside import CASES, Beside, Collectives
from tests.distributed.harness import cut, differences, state_of, stepped, values, whole
from tests.distributed.nets import fsdp, inputs, net
from tests.distributed.processes import Processes, Team

SHAPES = [(101, 96), (65, 300), (250, 300), (40, 512), (131,), (12, 700)]


def on_several(team: Team, case: str) -> list[Any]:
    """As experts are on a mesh of their own, and what FSDP2 ignores on none."""
    row, grid = team.mesh, team.meshes[2, 2]
    places: list[tuple[Any, tuple[Any, ...]]] = [
        (row, (Shard(0),)),
        (grid, (Shard(0), Shard(1))),
        (grid, (Replicate(), Shard(0))),
        (grid["tp"], (Shard(1),)),
        (None, ()),
        (grid["dp"], (Shard(0),)),
    ]
    name, options = CASES[case]
    start = values(SHAPES, 1, torch.float32)
    steps = [values(SHAPES, 10 + n, torch.float32) for n in range(3)]

    def placed(wholes: list[torch.Tensor]) -> list[torch.Tensor]:
        pairs = zip(wholes, places, strict=True)
        return [x.clone() if mesh is None else cut(x, mesh, p) for x, (mesh, p) in pairs]

    alone = stepped([nn.Parameter(x.clone()) for x in start], steps, name, options)
    many = stepped([nn.Parameter(x) for x in placed(start)], [*map(placed, steps)], name, options)
    pairs = zip(many.param_groups[0]["params"], alone.param_groups[0]["params"], strict=True)
    wrong = [tuple(q.shape) for p, q in pairs if not torch.equal(whole(p), q)]
    return [*wrong, *differences(state_of(many), state_of(alone))]


@pytest.mark.parametrize("case", ["adamw8bit", "lamb8bit", "clipped", "skips"])
def test_several_meshes_in_one_group(processes: Processes, case: str) -> None:
    assert processes.run(on_several, 4, case) == [[]] * 4


def in_halves(team: Team, case: str) -> tuple[list[str], list[int]]:
    """Two stages of a pipeline, each with an optimizer of its own, and steps of its own number."""
    mesh = team.meshes[2, 2]["tp"]
    name, options = CASES[case]
    both: Beside = Beside.of(fsdp(mesh), name, **options)
    sizes = set()
    for seed in range(3 if team.rank < 2 else 5):
        both.backward([2 * seed, 2 * seed + 1], team.rank % 2)
        both.compare_gradients()
        with Collectives() as collectives:
            both.optimizer.step()
        both.alone.step()
        both.compare()
        sizes |= {size for _, size in collectives.found}
    return both.wrong, sorted(sizes)


@pytest.mark.parametrize("case", ["lamb8bit", "clipped", "skips"])
def test_halves_do_not_wait_for_each_other(processes: Processes, case: str) -> None:
    assert processes.run(in_halves, 4, case) == [([], [2])] * 4


def saved_for_backward(team: Team) -> list[str]:
    """A backward through values of before the step is wrong, and autograd must say so."""
    model = net()
    fully_shard(model, mesh=team.mesh)
    optimizer = build_optimizer("adamw8bit", model)
    model(inputs(0)).backward()
    p = model.up.weight
    assert isinstance(p, DTensor)
    outer, inner = (p * p).sum(), p.to_local().square().sum()
    optimizer.step()
    found = []
    for loss in (outer, inner):
        try:
            loss.backward()
            found.append("")
        except RuntimeError as error:
            found.append(str(error))
    return found


def test_a_step_invalidates_what_was_saved_for_backward(processes: Processes) -> None:
    for messages in processes.run(saved_for_backward, 2):
        assert len(messages) == 2
        assert all("modified" in message for message in messages)
