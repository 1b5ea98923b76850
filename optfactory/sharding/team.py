"""The processes that hold different parts of tensors, and what they send each other."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

# Process groups over several dimensions of a mesh, by ranks, and the world in which they are good.
_groups: dict[tuple[int, ...], tuple[Any, Any]] = {}


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
        number = 0
        for index in self.dims:
            number = number * self.mesh.size(index) + place[index]
        return number

    @cached_property
    def group(self) -> Any:
        """Their process group. All of them must ask for it together, the first time."""
        if len(self.dims) == 1:
            return self.mesh.get_group(self.dims[0])
        return _group_of(self._global_ranks, self.mesh.get_group(self.dims[0]))

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """The rank of each in the process group, which may count in another order."""
        return tuple(dist.get_group_rank(self.group, rank) for rank in self._global_ranks)

    @cached_property
    def _global_ranks(self) -> list[int]:
        place = list(self.mesh.get_coordinate())
        found = []
        for numbers in itertools.product(*map(range, self.sizes)):
            for index, number in zip(self.dims, numbers, strict=True):
                place[index] = number
            found.append(int(self.mesh.mesh[tuple(place)]))
        return found


@dataclass(frozen=True)
class Transfer:
    """Elements that each process of a team sends to each other one.

    Attributes:
        team: the processes.
        sent, received: how many elements go to each of them, and come from it, by its number.
    """

    team: Team
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
        by_rank = sorted(range(self.team.size), key=self.team.ranks.__getitem__)
        dist.all_to_all_single(
            incoming,
            outgoing,
            [received[number] for number in by_rank],
            [sent[number] for number in by_rank],
            group=self.team.group,
        )


def _group_of(ranks: Sequence[int], part: Any) -> Any:
    """The process group of some ranks: that of all, or one which they make together.

    Args:
        part: a group of some of them, which knows how long to wait for others.
    """
    world, key = dist.group.WORLD, tuple(sorted(ranks))
    if len(key) == dist.get_world_size():
        return world
    known = _groups.get(key)
    if known is None or known[0] is not world:
        made = dist.new_group(list(key), timeout=_timeout(part), use_local_synchronization=True)
        known = _groups[key] = (world, made)
    return known[1]


def _timeout(group: Any) -> Any:
    """How long processes of a group wait for each other; None where that is not known."""
    try:
        device = group._device_types[0]
        return group._get_backend(torch.device(device)).options._timeout
    except (AttributeError, IndexError, RuntimeError):
        return None
