"""A mesh without processes, for plans."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class PlannedMesh:
    """One process's view of a mesh, as a torch.distributed.DeviceMesh gives it.

    Attributes:
        sizes: the number of processes along each dimension.
        place: the number of this process along each.
    """

    sizes: tuple[int, ...]
    place: tuple[int, ...]

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return len(self.sizes)

    def size(self, mesh_dim: int | None = None) -> int:
        """The number of processes along a dimension, or of all."""
        return math.prod(self.sizes) if mesh_dim is None else self.sizes[mesh_dim]

    def get_coordinate(self) -> list[int]:
        """The number of this process along each dimension."""
        return list(self.place)

    @classmethod
    def all_of(cls, sizes: tuple[int, ...]) -> Iterator[PlannedMesh]:
        """The views of all processes, by rank."""
        for place in itertools.product(*map(range, sizes)):
            yield cls(sizes, place)
