"""Who puts which matrix together, and what memory it takes, in plain numbers."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from optfactory import resolve
from optfactory.matrix.stacks import extents, stack_of
from optfactory.sharding.box import Box, Cut, all_boxes
from optfactory.sharding.dtensors import Sharding
from optfactory.sharding.planned import PlannedMesh
from optfactory.state.layout import StateLayout
from optfactory.step.batches import TeamRoom, batches_of
from optfactory.step.owners import owners_of, spread_of, team_of
from optfactory.step.slots import Slot

CPU = torch.device("cpu")
Cuts = tuple[Cut | None, ...]


def slot(
    shape: tuple[int, ...], mesh: tuple[int, ...], cuts: Cuts, number: int = 0, **asked: Any
) -> Slot:
    """A parameter as the first process of a mesh would have it."""
    config = resolve("muon32bit", **asked)
    group = config.model_dump()
    sharding = Sharding(shape, PlannedMesh(mesh, (0,) * len(mesh)), cuts)
    layout = StateLayout.of(shape, CPU, torch.float32, type(config), group, sharding)
    p = torch.empty(shape, device="meta").requires_grad_()
    return Slot(p, f"p{number}", number, group, type(config), layout)


# What is cut, and by what; whether all matrices are whole somewhere.
SPREADS: dict[str, tuple[tuple[int, ...], tuple[int, ...], Cuts, dict[str, Any], bool]] = {
    "rows": ((10, 7), (4,), (Cut(0),), {}, False),
    "columns": ((10, 7), (3,), (Cut(1),), {}, False),
    "few rows": ((3, 7), (4,), (Cut(0),), {}, False),
    "one row": ((1, 7), (4,), (Cut(0),), {}, True),
    "copies": ((10, 7), (2, 1), (None, Cut(0)), {}, True),
    "hsdp": ((10, 7), (2, 3), (None, Cut(0)), {}, False),
    "strided": ((10, 7), (2, 3), (Cut(0, 3), Cut(0)), {}, False),
    "both": ((10, 7), (2, 3), (Cut(0), Cut(1)), {}, False),
    "fused": ((12, 7), (4,), (Cut(0),), {"split": 3}, False),
    "fused, each whole": ((12, 7), (3,), (Cut(0),), {"split": 3}, True),
    "experts": ((6, 4, 5), (4,), (Cut(0),), {}, True),
    "experts in rows": ((6, 4, 5), (2, 3), (Cut(0), Cut(1)), {}, False),
    "kernels": ((6, 4, 3, 3), (2, 2), (Cut(1), Cut(2)), {"flatten": True}, False),
}


@pytest.mark.parametrize("title", SPREADS)
def test_parts_are_those_that_processes_hold(title: str) -> None:
    shape, mesh, cuts, asked, is_whole = SPREADS[title]
    one = slot(shape, mesh, cuts, **asked)
    assert one.layout.piece is not None
    team, matrices = one.layout.piece.sharding.team, spread_of(one)
    assert (team_of(one) is None) == is_whole
    stack = stack_of(shape, one.group)
    assert stack is not None
    numbers = torch.arange(stack.numel).view(shape)
    found = [numbers[matrix.box.slices].reshape(stack.rows, stack.cols) for matrix in matrices]
    assert torch.equal(torch.stack(found), numbers.view(stack.count, stack.rows, stack.cols))
    held: Counter[int] = Counter()
    for matrix in matrices:
        seen = torch.zeros(shape)
        for holder, part in zip(matrix.holders, matrix.parts, strict=True):
            own = part.inside(matrix.box)
            assert torch.equal(numbers[matrix.box.slices][own], numbers[part.slices])
            seen[part.slices] += 1
            held[holder] += part.numel
        assert torch.equal(seen[matrix.box.slices], torch.ones(matrix.box.sizes))
        assert matrix.gathered[0] == max(part.numel for part in matrix.parts)
        assert matrix.gathered[-1] == stack.rows * stack.cols
    boxes = all_boxes(shape, team.sizes, one.layout.piece.sharding.team_cuts)
    assert [held[n] for n in range(team.size)] == [box.numel for box in boxes]
    assert boxes[0].numel == max(box.numel for box in boxes)


def test_matrices_of_the_same_holders_take_turns() -> None:
    kinds: Sequence[Slot] = [slot((10, 7), (4,), (Cut(0),), n) for n in range(6)]
    assert owners_of(m for one in kinds for m in spread_of(one)) == [0, 1, 2, 3, 0, 1]
    few = slot((3, 7), (4,), (Cut(0),))
    assert owners_of(spread_of(few) * 4) == [0, 1, 2, 0]
    experts = slot((4, 6, 5), (2, 2), (Cut(0), Cut(1)))
    assert owners_of(spread_of(experts)) == [0, 1, 2, 3]


def test_batches_have_a_matrix_for_each_process() -> None:
    shapes = [(64, 48)] * 9 + [(48, 64)] * 3
    slots = [slot(shape, (4,), (Cut(0),), n) for n, shape in enumerate(shapes)]
    ((team, batches),) = batches_of(slots, CPU).items()
    assert team is not None
    assert [len(batch.members) for batch in batches] == [4, 4, 1, 3]
    assert all(batch.together == 1 for batch in batches[:2])
    # More of them than processes come in whole rounds, as long as there are more.
    room = TeamRoom(slots, CPU)
    limit = room.nbytes(range(6), 1)
    few = batches_of(slots, CPU, {team: limit})[team]
    assert [len(batch.members) for batch in few] == [4, 5, 3]
    assert all(batch.nbytes <= limit for batch in few)
    assert [len(b.members) for b in batches_of(slots, CPU, {team: 1})[team]] == [1] * 12


def test_memory_is_of_parts_matrices_and_products() -> None:
    slots = [slot((64, 64), (4,), (Cut(0),), n) for n in range(4)]
    room, matrix = TeamRoom(slots, CPU), 4 * 64 * 64
    # Of each matrix a quarter, and one that is whole; products have room for what is on its way.
    assert room.own(range(4)) == (matrix, matrix)
    assert room.products(range(4), 1) == 3 * matrix
    assert room.nbytes(range(4), 1) == 5 * matrix
    # Along two dimensions, halves of half the matrices meet in between.
    grid = [slot((64, 64), (2, 2), (Cut(0), Cut(1)), n) for n in range(4)]
    assert TeamRoom(grid, CPU).own(range(4)) == (matrix, matrix)
    assert TeamRoom(grid, CPU).nbytes(range(4), 1) == 2 * matrix + 4 * matrix


@pytest.mark.parametrize("title", SPREADS)
def test_second_moments_of_neurons_make_a_team_of_all(title: str) -> None:
    """Also of processes that have whole matrices, in which nothing moves; not of one alone."""
    shape, mesh, cuts, asked, _ = SPREADS[title]
    own, plain = (slot(shape, mesh, cuts, neuron_norm=on, **asked) for on in (True, False))
    piece = own.layout.piece
    assert piece is not None
    assert team_of(own) == (None if title == "copies" else piece.sharding.team)
    assert owners_of(spread_of(own)) == owners_of(spread_of(plain))
    spec = own.layout.tensors["neuron_second_moment"]
    stack = stack_of(shape, own.group)
    assert stack is not None
    assert spec.nbytes == spec.global_nbytes == 4 * stack.count * stack.rows
    assert "neuron_second_moment" not in plain.layout.tensors


def test_whole_matrices_need_no_room_to_be_put_together() -> None:
    """Experts whose neurons are kept by all: beside them only what products need."""
    slots = [slot((8, 64, 64), (4,), (Cut(0),), n, neuron_norm=True) for n in range(2)]
    room, matrix = TeamRoom(slots, CPU), 4 * 64 * 64
    assert room.own(range(2)) == (4 * matrix, 0)
    assert room.nbytes(range(2), 1) == 4 * matrix + 3 * matrix
    cut = slot((8, 64, 64), (4,), (Cut(1),), 2, neuron_norm=True)
    ((team, batches),) = batches_of([*slots, cut], CPU, {team_of(cut): 10**9}).items()
    assert team is not None
    assert [batch.members for batch in batches] == [(0, 1), (2,)]


def test_second_moments_and_decay_rates_are_not_mixed_in_a_batch() -> None:
    asked: list[dict[str, Any]] = [{}, {"neuron_norm": True}]
    asked += [{"neuron_norm": True, "neuron_beta": 0.5}, {}, {"neuron_norm": True}]
    slots = [slot((64, 48), (4,), (Cut(0),), n, **own) for n, own in enumerate(asked)]
    ((team, batches),) = batches_of(slots, CPU, dict.fromkeys([team_of(slots[0])], 10**9)).items()
    assert team is not None
    assert [batch.members for batch in batches] == [(0, 3), (1, 4), (2,)]


def test_boxes_in_one_order_on_all_processes() -> None:
    cuts = (Cut(0, 3), Cut(0))
    places = itertools.product(range(2), range(3))
    assert all_boxes((10, 7), (2, 3), cuts) == tuple(
        Box.at((10, 7), (2, 3), place, cuts) for place in places
    )


def test_extents_follow_each_other_in_memory() -> None:
    for shape, split, flatten in [((6, 5), 2, False), ((3, 4, 5), 2, False), ((6, 2, 3), 3, True)]:
        numbers = torch.arange(torch.Size(shape).numel()).view(shape)
        boxes = [Box(shape, sizes, offsets) for offsets, sizes in extents(shape, split, flatten)]
        found = torch.cat([numbers[box.slices].flatten() for box in boxes])
        assert torch.equal(found, numbers.flatten())
