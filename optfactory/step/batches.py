"""Batches of parameters whose matrices share scratch memory, here or over processes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import torch

from optfactory.matrix.packing import Room, StackBatch, pack
from optfactory.matrix.scratch import aligned
from optfactory.matrix.stacks import how_of
from optfactory.sharding.box import all_boxes
from optfactory.sharding.team import Team
from optfactory.step.owners import (
    SpreadMatrix,
    are_whole,
    owners_of,
    spread_of,
    stack_for,
    stack_here,
    team_of,
)
from optfactory.step.slots import Slot

_FLOAT = 4  # bytes

# Batches by the processes that put their matrices together; None for those that are whole.
Packed = dict[Team | None, list[StackBatch]]


class TeamRoom(Room):
    """The memory of matrices that processes of a team put together.

    First there are the parts that a process holds; behind them the matrices that it owns, and
    behind these what products need. There the parts lie too while they are on their way. Where
    parts are whole matrices, these are what it owns. All processes reserve what the one needs that
    has most, so that they agree on batches.
    """

    def __init__(self, slots: Sequence[Slot], device: torch.device) -> None:
        super().__init__([stack_for(slot) for slot in slots], _dtypes(slots, device), device)
        self._spread = [spread_of(slot) for slot in slots]
        self._are_whole = list(map(are_whole, slots))
        pieces = [slot.layout.piece for slot in slots]
        shardings = [piece.sharding for piece in pieces if piece is not None]
        self._sizes = shardings[0].team.sizes
        self.processes = math.prod(self._sizes)
        # The first of the team has most.
        self._numel = [
            all_boxes(own.shape, self._sizes, own.team_cuts)[0].numel for own in shardings
        ]

    def most(self, members: Sequence[int]) -> int:
        return max(Counter(owner for _, owner in self._owned(members)).values())

    def own(self, members: Sequence[int]) -> tuple[int, int]:
        """Bytes of the parts that a process holds, and of the matrices that it owns, at most."""
        first = self.stacks[members[0]]
        parts = sum(self._numel[n] for n in members)
        put_together = 0 if self._are_whole[members[0]] else self.most(members)
        whole = put_together * first.rows * first.cols
        return aligned(_FLOAT * parts), aligned(_FLOAT * whole)

    def nbytes(self, members: Sequence[int], together: int) -> int:
        parts, whole = self.own(members)
        if not whole:
            return parts + self.products(members, together)
        stations = [parts, *self._halfway(members), whole]
        # What goes along a dimension, and what has come.
        moving = sum(before + behind for before, behind in pairwise(stations))
        return parts + whole + max(moving, self.products(members, together))

    def _owned(self, members: Sequence[int]) -> Iterator[tuple[SpreadMatrix, int]]:
        """The matrices with their owners."""
        matrices = [matrix for n in members for matrix in self._spread[n]]
        return zip(matrices, owners_of(matrices), strict=True)

    def _halfway(self, members: Sequence[int]) -> list[int]:
        """Bytes that a process has, at most, between two dimensions along which parts go."""
        loads: list[Counter[int]] = [Counter() for _ in self._sizes[1:]]
        for matrix, owner in self._owned(members) if loads else ():
            for step, load in enumerate(loads, start=1):
                load[owner % math.prod(self._sizes[-step:])] += matrix.gathered[step]
        return [aligned(_FLOAT * max(load.values())) for load in loads]


def batches_of(
    slots: Sequence[Slot], device: torch.device, limits: Mapping[Team | None, int] | None = None
) -> Packed:
    """How parameters share scratch memory.

    Args:
        limits: bytes for the matrices of each team; None is what their groups say.
    """
    teams: dict[Team | None, list[int]] = {}
    for number, slot in enumerate(slots):
        teams.setdefault(team_of(slot), []).append(number)
    packed: Packed = {}
    for team, numbers in teams.items():
        own = [slots[n] for n in numbers]
        limit = _stated_limit(own) if limits is None else limits[team]
        packed[team] = [
            replace(batch, members=tuple(numbers[n] for n in batch.members))
            for batch in pack(_room_of(own, team, device), _alike(own, device), limit)
        ]
    return packed


def _room_of(slots: Sequence[Slot], team: Team | None, device: torch.device) -> Room:
    if team is not None:
        return TeamRoom(slots, device)
    return Room([stack_here(slot) for slot in slots], _dtypes(slots, device), device)


def _dtypes(slots: Sequence[Slot], device: torch.device) -> list[torch.dtype]:
    return [how_of(slot.group, device).dtype for slot in slots]


def _alike(slots: Sequence[Slot], device: torch.device) -> list[object]:
    """What parameters of one batch share beside their shape."""
    return [
        (
            how_of(slot.group, device),
            are_whole(slot),
            slot.group["adjust_lr"],
            slot.group["neuron_beta"] if slot.group["neuron_norm"] else None,
        )
        for slot in slots
    ]


def _stated_limit(slots: Sequence[Slot]) -> int | None:
    stated = [slot.group["ns_memory"] for slot in slots]
    return None if None in stated else max(stated, default=None)
