"""Numbers completed over processes: one all-reduce of one vector for each process group."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

# Where in a vector the numbers of a tensor are, and which process groups hold its other parts.
Place = tuple[int, int, Sequence[Any]]


class Reduction:
    """Sums or maxima of sharded tensors, all of them in one vector.

    Every process of a group takes part with the same vector, whatever it holds: zeros stand for
    empty parts and for tensors without a gradient. A tensor that several dimensions of a mesh cut
    goes through the vectors of their groups one after the other.

    Args:
        sizes: how many numbers each tensor has, in the same order on all processes.
        groups: the process groups that hold parts of it.
    """

    def __init__(
        self, sizes: Mapping[Any, int], groups: Mapping[Any, Sequence[Any]], *, maximum: bool
    ) -> None:
        self.begin: dict[Any, int] = {}
        self.size = 0
        for key, size in sizes.items():
            self.begin[key] = self.size
            self.size += size
        self._dtype = torch.float32 if maximum else torch.float64
        self._operation = dist.ReduceOp.MAX if maximum else dist.ReduceOp.SUM
        members: dict[str, tuple[Any, list[Any]]] = {}
        for key in sizes:
            for group in groups[key]:
                members.setdefault(group.group_name, (group, []))[1].append(key)
        self._vectors = [
            (group, None if len(keys) == len(sizes) else self._numbers(keys, sizes))
            for group, keys in members.values()
        ]

    def _numbers(self, keys: Iterable[Any], sizes: Mapping[Any, int]) -> Tensor:
        words: dict[str, Any] = {"dtype": torch.int64, "device": "cpu"}
        parts = [torch.arange(self.begin[k], self.begin[k] + sizes[k], **words) for k in keys]
        return torch.cat(parts)

    def vector(self, device: torch.device) -> Tensor:
        """Zeros to be filled with the numbers of what is here."""
        return torch.zeros(self.size, dtype=self._dtype, device=device)

    def complete(self, vector: Tensor) -> None:
        """Sum up the vector, or take the greatest, over the processes."""
        for group, numbers in self._vectors:
            if numbers is None:
                dist.all_reduce(vector, op=self._operation, group=group)
                continue
            numbers = numbers.to(vector.device)
            part = vector[numbers]
            dist.all_reduce(part, op=self._operation, group=group)
            vector[numbers] = part


def agree(values: Tensor, sweep: Sequence[Any]) -> None:
    """Make numbers on all processes the greatest that one of them has, in place.

    Args:
        sweep: process groups, as `sweep_of` finds them.
    """
    for group in sweep:
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=group)


def sweep_of(meshes: Iterable[Any]) -> list[Any]:
    """The process groups of some meshes, in an order in which news reach all processes.

    Of one mesh these are the groups of its dimensions. Several may overlap, so that what the last
    one says must reach the first again.
    """
    distinct = list(dict.fromkeys(meshes))
    groups = mesh_groups(distinct)
    return groups if len(distinct) < 2 else [*groups, *reversed(groups[:-1])]


def host_can_answer(groups: Iterable[Any]) -> bool:
    """Whether process groups reduce numbers in the host's memory too, without a GPU's stream."""
    return all(torch.device("cpu") in getattr(group, "_device_types", ()) for group in groups)


def mesh_groups(meshes: Iterable[Any]) -> list[Any]:
    """The process groups of all dimensions of some meshes that have several processes."""
    found = {}
    for mesh in meshes:
        for index in range(mesh.ndim):
            if mesh.size(index) > 1:
                group = mesh.get_group(index)
                found[group.group_name] = group
    return list(found.values())
