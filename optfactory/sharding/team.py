"""The processes that hold different parts of tensors, and what they send each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor
from torch import distributed as dist


@dataclass(frozen=True)
class Team:
    """Processes of a mesh among which tensors are cut, as one of them sees it.

    They are numbered by their places, that along the last dimension running fastest.

    Attributes:
        mesh: a torch.distributed.DeviceMesh, or one of a plan.
        dims: the dimensions of it along which they are; its other ones have copies.
    """

    mesh: Any
    dims: tuple[int, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """The number of processes along each dimension."""
        return tuple(self.mesh.size(index) for index in self.dims)

    @property
    def size(self) -> int:
        """The number of all."""
        return math.prod(self.sizes)

    @property
    def number(self) -> int:
        """That of this process."""
        place = self.mesh.get_coordinate()
        return self.number_at([place[index] for index in self.dims])

    @property
    def lines(self) -> tuple[Line, ...]:
        """Those of them that differ from this one in one dimension, for each."""
        return tuple(Line(self.mesh, index) for index in self.dims)

    def add_up(self, values: Tensor) -> None:
        """Sum up numbers over all of them, in place."""
        for line in self.lines:
            dist.all_reduce(values, group=line.group)

    def number_at(self, place: Sequence[int]) -> int:
        """The number of the process at a place."""
        number = 0
        for size, own in zip(self.sizes, place, strict=True):
            number = number * size + own
        return number

    def place_of(self, number: int) -> tuple[int, ...]:
        """The place of a process."""
        place = []
        for size in reversed(self.sizes):
            number, own = divmod(number, size)
            place.append(own)
        return tuple(reversed(place))


@dataclass(frozen=True)
class Line:
    """Processes along one dimension of a mesh, this one among them."""

    mesh: Any
    dim: int

    @property
    def size(self) -> int:
        """The number of them."""
        return int(self.mesh.size(self.dim))

    @property
    def place(self) -> int:
        """That of this process."""
        return int(self.mesh.get_coordinate()[self.dim])

    @property
    def group(self) -> Any:
        """Their process group."""
        return self.mesh.get_group(self.dim)

    @cached_property
    def by_rank(self) -> list[int]:
        """Their places in the order of their ranks in the group, which may be another."""
        place = list(self.mesh.get_coordinate())
        ranks = []
        for own in range(self.size):
            place[self.dim] = own
            ranks.append(dist.get_group_rank(self.group, int(self.mesh.mesh[tuple(place)])))
        return sorted(range(self.size), key=ranks.__getitem__)


@dataclass(frozen=True)
class Transfer:
    """Elements that each process of a line sends to each other one.

    Attributes:
        sent, received: how many go to each place, and come from it.
    """

    line: Line
    sent: tuple[int, ...]
    received: tuple[int, ...]

    def run(self, outgoing: Tensor, incoming: Tensor) -> None:
        """Send what is for the others, in the order of their ranks, and wait for what they send."""
        self._exchange(outgoing, incoming, self.sent, self.received)

    def back(self, outgoing: Tensor, incoming: Tensor) -> None:
        """The same in the other direction."""
        self._exchange(outgoing, incoming, self.received, self.sent)

    def _exchange(
        self, outgoing: Tensor, incoming: Tensor, sent: Sequence[int], received: Sequence[int]
    ) -> None:
        order = self.line.by_rank
        dist.all_to_all_single(
            incoming,
            outgoing,
            [received[place] for place in order],
            [sent[place] for place in order],
            group=self.line.group,
        )
