"""Matrices of which processes hold parts, put together by their owners and taken apart again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optfactory.matrix.scratch import aligned
from optfactory.sharding.box import Box
from optfactory.sharding.team import Team, Transfer
from optfactory.step.owners import SpreadMatrix, owners_of


@dataclass(frozen=True)
class _Part:
    """A part of a matrix that this process holds or owns: who has it otherwise, and where it is."""

    other: int
    view: Tensor


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
        flat = [matrix for own in matrices for matrix in own]
        owners = owners_of(flat)
        places = [place for place, own in enumerate(matrices) for _ in own]
        held, owned = list[_Part](), list[_Part]()
        count = 0
        for matrix, owner, place in zip(flat, owners, places, strict=True):
            for holder, part in zip(matrix.holders, matrix.parts, strict=True):
                if holder == team.number:
                    held.append(_Part(owner, parts[place][part.inside(boxes[place])]))
                if owner == team.number:
                    own = whole[count].view(matrix.box.sizes)
                    owned.append(_Part(holder, own[part.inside(matrix.box)]))
            count += owner == team.number
        self._here = _pairs(held, owned, team.number)
        sent, received = (_for_others(found, team) for found in (held, owned))
        self.transfer = Transfer(team, _counts(sent, team), _counts(received, team))
        self._outgoing, self._held = _packed(sent, buffers)
        behind = buffers[aligned(self._outgoing.nbytes) :]
        self._incoming, self._owned = _packed(received, behind)

    @property
    def sent_bytes(self) -> int:
        """Bytes that this process sends to others, there and back."""
        return self._outgoing.nbytes + self._incoming.nbytes

    def gather(self) -> None:
        """Put together the matrices that this process owns."""
        _copy((packed, view) for view, packed in self._held)
        _copy((whole, part) for part, whole in self._here)
        self.transfer.run(self._outgoing, self._incoming)
        _copy(self._owned)

    def scatter(self) -> None:
        """Give the parts back to those that hold them."""
        _copy((packed, view) for view, packed in self._owned)
        _copy(self._here)
        self.transfer.back(self._incoming, self._outgoing)
        _copy(self._held)


Pairs = list[tuple[Tensor, Tensor]]


def _pairs(held: Sequence[_Part], owned: Sequence[_Part], number: int) -> Pairs:
    """What does not leave this process: where it is held, and in the matrix."""
    mine = ([part.view for part in found if part.other == number] for found in (held, owned))
    return list(zip(*mine, strict=True))


def _for_others(found: Sequence[_Part], team: Team) -> list[_Part]:
    """What goes to other processes, or comes from them, in the order of their ranks."""
    others = [part for part in found if part.other != team.number]
    return sorted(others, key=lambda part: team.ranks[part.other])


def _counts(found: Sequence[_Part], team: Team) -> tuple[int, ...]:
    counts = [0] * team.size
    for part in found:
        counts[part.other] += part.view.numel()
    return tuple(counts)


def _packed(found: Sequence[_Part], memory: Tensor) -> tuple[Tensor, Pairs]:
    """A buffer of all parts, one behind the other; and each part with its place there."""
    sizes = [part.view.numel() for part in found]
    buffer = memory[: 4 * sum(sizes)].view(torch.float32)
    places = torch.split(buffer, sizes) if sizes else ()
    pairs = zip(found, places, strict=True)
    return buffer, [(part.view, place.view(part.view.shape)) for part, place in pairs]


def _copy(pairs: Iterator[tuple[Tensor, Tensor]] | Pairs) -> None:
    """Copy into the first of each pair the second."""
    both = list(pairs)
    if both:
        into, values = zip(*both, strict=True)
        torch._foreach_copy_(into, values)
