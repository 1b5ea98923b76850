"""Matrices of which processes hold parts, put together by their owners and taken apart again.

Parts go to the owner dimension by dimension of the mesh, the last one first: along each there is a
process group already, and a new one for all of them would need processes that have no part in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from optfactory.matrix.scratch import aligned
from optfactory.sharding.box import Box
from optfactory.sharding.team import Line, Team, Transfer
from optfactory.step.owners import SpreadMatrix, owners_of

Place = tuple[int, ...]
Pairs = list[tuple[Tensor, Tensor]]


@dataclass
class _Part:
    """A part of a matrix, which some process holds and one needs.

    Attributes:
        place: of the process that has it now.
        owner: of the one that needs it.
        numel: the number of its elements.
        whole: where the owner puts it; None on others.
        view: where it is here; None as long as it is elsewhere.
    """

    place: Place
    owner: Place
    numel: int
    whole: Tensor | None
    view: Tensor | None


@dataclass(frozen=True)
class _Stage:
    """What goes along one dimension.

    Attributes:
        outgoing, incoming: buffers.
        sources: what goes out, with its places in the buffer.
    """

    transfer: Transfer
    outgoing: Tensor
    incoming: Tensor
    sources: Pairs = field(repr=False)


class Assembly:
    """The exchange of one batch.

    Args:
        team: the processes.
        matrices: of each parameter.
        boxes: the elements of each that this process holds.
        parts: these elements.
        whole: room for the matrices that it owns, in their order: [count, rows, cols].
        buffers: uint8, for what is on its way.
    """

    def __init__(
        self,
        team: Team,
        matrices: Sequence[Sequence[SpreadMatrix]],
        boxes: Sequence[Box],
        parts: Sequence[Tensor],
        whole: Tensor,
        buffers: Tensor,
    ) -> None:
        here = team.place_of(team.number)
        found = _parts(team, matrices, boxes, parts, whole)
        self._stages: list[_Stage] = []
        for dim in reversed(range(len(team.dims))):
            stage = _stage(found, team.lines[dim], dim, here, buffers)
            buffers = buffers[aligned(stage.outgoing.nbytes) + aligned(stage.incoming.nbytes) :]
            self._stages.append(stage)
        self._owned: Pairs = [
            (part.whole, part.view)
            for part in found
            if part.whole is not None and part.view is not None
        ]

    @property
    def sent_bytes(self) -> int:
        """Bytes that this process sends to others, there and back."""
        return sum(stage.outgoing.nbytes + stage.incoming.nbytes for stage in self._stages)

    def gather(self) -> None:
        """Put together the matrices that this process owns."""
        for stage in self._stages:
            _copy([(place, view) for view, place in stage.sources])
            stage.transfer.run(stage.outgoing, stage.incoming)
        _copy(self._owned)

    def scatter(self) -> None:
        """Give the parts back to those that hold them."""
        _copy([(view, whole) for whole, view in self._owned])
        for stage in reversed(self._stages):
            stage.transfer.back(stage.incoming, stage.outgoing)
            _copy(stage.sources)


def _parts(
    team: Team,
    matrices: Sequence[Sequence[SpreadMatrix]],
    boxes: Sequence[Box],
    parts: Sequence[Tensor],
    whole: Tensor,
) -> list[_Part]:
    """The parts of all matrices, in an order that is the same on all processes."""
    flat = [(matrix, index) for index, own in enumerate(matrices) for matrix in own]
    found, count, number = [], 0, team.number
    for (matrix, index), owner in zip(flat, owners_of(m for m, _ in flat), strict=True):
        own = whole[count].view(matrix.box.sizes) if owner == number else None
        for holder, part in zip(matrix.holders, matrix.parts, strict=True):
            place = None if own is None else own[part.inside(matrix.box)]
            view = parts[index][part.inside(boxes[index])] if holder == number else None
            ends = team.place_of(holder), team.place_of(owner)
            found.append(_Part(*ends, part.numel, place, view))
        count += owner == number
    return found


def _stage(found: list[_Part], line: Line, dim: int, here: Place, memory: Tensor) -> _Stage:
    """Move parts along a dimension, each to where its owner is."""
    leaving, coming = list[tuple[int, _Part]](), list[tuple[int, _Part]]()
    for part in found:
        before, now = part.place, part.owner[dim]
        part.place = (*before[:dim], now, *before[dim + 1 :])
        if before == here != part.place:
            leaving.append((now, part))
        elif part.place == here != before:
            coming.append((before[dim], part))
    outgoing, places = _packed(leaving, line, memory)
    sources = [(part.view, place) for part, place in places if part.view is not None]
    incoming, arrivals = _packed(coming, line, memory[aligned(outgoing.nbytes) :])
    for part, _ in places:
        part.view = None
    for part, place in arrivals:
        part.view = place if part.whole is None else place.view(part.whole.shape)
    shaped = [(view, place.view(view.shape)) for view, place in sources]
    counts = (_counts(parts, line) for parts in (leaving, coming))
    return _Stage(Transfer(line, *counts), outgoing, incoming, shaped)


def _packed(
    parts: Sequence[tuple[int, _Part]], line: Line, memory: Tensor
) -> tuple[Tensor, list[tuple[_Part, Tensor]]]:
    """A buffer of parts in the order of the ranks of those at the other end; each one's place."""
    rank = {place: rank for rank, place in enumerate(line.by_rank)}
    ordered = [part for _, part in sorted(parts, key=lambda item: rank[item[0]])]
    sizes = [part.numel for part in ordered]
    buffer = memory[: 4 * sum(sizes)].view(torch.float32)
    places = torch.split(buffer, sizes) if sizes else ()
    return buffer, list(zip(ordered, places, strict=True))


def _counts(parts: Sequence[tuple[int, _Part]], line: Line) -> tuple[int, ...]:
    counts = [0] * line.size
    for place, part in parts:
        counts[place] += part.numel
    return tuple(counts)


def _copy(pairs: Pairs) -> None:
    """Copy into the first of each pair the second."""
    if pairs:
        into, values = map(list, zip(*pairs, strict=True))
        torch._foreach_copy_(into, values)
