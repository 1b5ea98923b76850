"""Which process makes which matrix orthogonal, where their parts are spread over several.

Each matrix is put together by one of the processes that hold a part of it: in a batch, those with
the same holders go to these in turns. So work is spread, and what is whole somewhere stays there.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from optfactory.errors import ConfigError
from optfactory.matrix.stacks import Stack, extents, stack_of
from optfactory.sharding.box import Box, Cut, Shape, all_boxes
from optfactory.sharding.team import Team
from optfactory.step.slots import Slot


@dataclass(frozen=True)
class SpreadMatrix:
    """A matrix and who holds parts of it.

    Attributes:
        box: its elements among those of the parameter.
        holders: numbers of processes of the team.
        parts: the elements that each of these holds.
        gathered: the most elements that one process has of it, before parts are brought together
            along the team's dimensions and behind each of these, the last one first.
    """

    box: Box
    holders: tuple[int, ...]
    parts: tuple[Box, ...]
    gathered: tuple[int, ...]


def team_of(slot: Slot) -> Team | None:
    """The processes that must put the parameter's matrices together; None if all are whole.

    As all keep the second moments of all neurons, they must meet for these even then.
    """
    piece = slot.layout.piece
    if piece is None or not piece.sharding.cuts:
        return None
    if are_whole(slot) and not slot.group["neuron_norm"]:
        return None
    return piece.sharding.team


def are_whole(slot: Slot) -> bool:
    """Whether each of the parameter's matrices is all on one process."""
    return slot.layout.piece is None or all(len(one.holders) == 1 for one in spread_of(slot))


def spread_of(slot: Slot) -> tuple[SpreadMatrix, ...]:
    """The matrices of a sharded parameter, in their order."""
    assert slot.layout.piece is not None
    sharding, group = slot.layout.piece.sharding, slot.group
    flatten = group["flatten"] and len(sharding.shape) > 2
    sizes, cuts = sharding.team.sizes, sharding.team_cuts
    return _spread(sharding.shape, group["split"], flatten, sizes, cuts)


@lru_cache(maxsize=1024)
def _spread(
    shape: Shape, split: int, flatten: bool, mesh: Shape, cuts: tuple[Cut | None, ...]
) -> tuple[SpreadMatrix, ...]:
    boxes, found = all_boxes(shape, mesh, cuts), []
    for offsets, sizes in extents(shape, split, flatten):
        box = Box(shape, sizes, offsets)
        parts = [(number, own.overlap(box)) for number, own in enumerate(boxes)]
        held = [(number, part) for number, part in parts if part.numel]
        holders, overlaps = zip(*held, strict=True)
        found.append(SpreadMatrix(box, holders, overlaps, _gathered(held, mesh)))
    return tuple(found)


def _gathered(held: list[tuple[int, Box]], mesh: Shape) -> tuple[int, ...]:
    found = []
    for dim in range(len(mesh), -1, -1):
        together: Counter[int] = Counter()
        for number, part in held:
            together[number // math.prod(mesh[dim:])] += part.numel
        found.append(max(together.values()))
    return tuple(found)


def owners_of(matrices: Iterable[SpreadMatrix]) -> list[int]:
    """Who makes each matrix of a batch orthogonal."""
    turns: Counter[tuple[int, ...]] = Counter()
    owners = []
    for matrix in matrices:
        holders = matrix.holders
        # Compared faster than a thousand numbers, and hardly ever the same for others.
        key = (holders[0], holders[-1], len(holders))
        owners.append(holders[turns[key] % len(holders)])
        turns[key] += 1
    return owners


def stack_for(slot: Slot) -> Stack:
    """The matrices of a parameter.

    Raises:
        ConfigError: it has none, as its group was edited since it was checked.
    """
    shape, group = slot.layout.shape, slot.group
    found = stack_of(shape, group)
    if found is None:
        raise ConfigError(
            f"cannot update {slot.name}: '{slot.schema.family}' trains matrices, and {shape} is "
            f"none with split: {group['split']} and flatten: {group['flatten']}; set these back, "
            "or put it into a group with another optimizer"
        )
    return found


def stack_here(slot: Slot) -> Stack:
    """Those of a parameter whose matrices are all whole that this process has."""
    whole = stack_for(slot)
    if slot.layout.piece is None:
        return whole
    count = slot.layout.piece.box.numel // (whole.rows * whole.cols)
    return Stack(count, whole.rows, whole.cols)
