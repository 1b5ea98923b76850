"""How parameters share scratch memory for their matrices, batch by batch."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import torch

from optfactory.matrix.scratch import aligned, scratch_bytes
from optfactory.matrix.stacks import Stack

_FLOAT = 4  # bytes


@dataclass(frozen=True)
class StackBatch:
    """Parameters whose matrices are in scratch memory at the same time.

    Attributes:
        members: their numbers.
        together: how many matrices are multiplied at once.
        nbytes: of the matrices, and of what products need.
    """

    members: tuple[int, ...]
    together: int
    nbytes: int


class Room:
    """The memory of matrices that are all here.

    Args:
        stacks: the matrices of each parameter.
        dtypes: of the operands of each parameter's products.
        device: where they are.
    """

    # Over so many the matrices of a batch are spread.
    processes = 1

    def __init__(
        self, stacks: Sequence[Stack], dtypes: Sequence[torch.dtype], device: torch.device
    ) -> None:
        self.stacks, self._dtypes, self._device = stacks, dtypes, device

    def count(self, members: Sequence[int]) -> int:
        """The number of all matrices of some parameters."""
        return sum(self.stacks[n].count for n in members)

    def most(self, members: Sequence[int]) -> int:
        """How many of them one process multiplies."""
        return self.count(members)

    def nbytes(self, members: Sequence[int], together: int) -> int:
        """What a batch needs of which so many matrices are multiplied at once."""
        matrices = aligned(_FLOAT * sum(self.stacks[n].numel for n in members))
        return matrices + self.products(members, together)

    def products(self, members: Sequence[int], together: int) -> int:
        """What the products alone need."""
        first = self.stacks[members[0]]
        shape, dtype = (first.rows, first.cols), self._dtypes[members[0]]
        return scratch_bytes(together, shape, dtype, self._device)


def pack(room: Room, alike: Sequence[Hashable], limit: int | None) -> list[StackBatch]:
    """Batches of parameters with matrices of one shape, within a limit of bytes.

    One parameter is always taken. Processes get equally many matrices where the limit allows more
    than one for each.

    Args:
        alike: what parameters of one batch share beside the shape.
        limit: None is what the largest matrices need, one for each process.
    """
    kinds: dict[Hashable, list[int]] = {}
    for number, (stack, key) in enumerate(zip(room.stacks, alike, strict=True)):
        kinds.setdefault((stack.rows, stack.cols, key), []).append(number)
    if limit is None:
        runs = [run for members in kinds.values() for run in _least(room, members)]
        limit = max((room.nbytes(run, 1) for run in runs), default=0)
    batches = []
    for members in kinds.values():
        while members:
            size = _fitting(room, members, limit)
            taken, members = members[:size], members[size:]
            most, together = room.most(taken), 1
            while together < most and room.nbytes(taken, together + 1) <= limit:
                together += 1
            batches.append(StackBatch(tuple(taken), together, room.nbytes(taken, together)))
    return batches


def _least(room: Room, members: Sequence[int]) -> Iterator[list[int]]:
    """Parameters of one kind, in runs of as many matrices as there are processes, or just more."""
    run: list[int] = []
    for number in members:
        run.append(number)
        if room.count(run) >= room.processes:
            yield run
            run = []
    if run:
        yield run


def _fitting(room: Room, members: Sequence[int], limit: int) -> int:
    """How many of the first parameters are taken into one batch."""
    size = 1
    while size < len(members) and room.nbytes(members[: size + 1], 1) <= limit:
        size += 1
    if size == len(members):
        return size
    even = [n for n in range(1, size + 1) if room.count(members[:n]) % room.processes == 0]
    return max(even, default=size)
