"""The box of a tensor's elements that one process holds, in plain numbers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Cut:
    """How a dimension of a mesh cuts a tensor; the numbers of torch's `Shard` and `_StridedShard`.

    Attributes:
        dim: the dimension of the tensor that is cut.
        split_factor: into how many parts later dimensions of the mesh have cut it before. It is 1
            where they cut in the order of the mesh; FSDP2 cuts what tensor parallelism left, though
            its dimension of the mesh is the first.
    """

    dim: int
    split_factor: int = 1


@dataclass(frozen=True)
class Runs:
    """Elements in runs that lie as far apart in the whole tensor as each other.

    Element `i` of the box, in row-major order, is element ``first + i // length * stride + i %
    length`` of the whole tensor.

    Attributes:
        count, length: the number of runs, and the elements of each.
        first: where the first run begins.
        stride: from the begin of a run to that of the next.
    """

    count: int
    length: int
    first: int
    stride: int


@dataclass(frozen=True)
class Box:
    """A box of a tensor's elements.

    Attributes:
        shape: of the whole tensor.
        sizes: of the box.
        offsets: where the box begins, in each dimension.
    """

    shape: Shape
    sizes: Shape
    offsets: Shape

    @classmethod
    def at(
        cls, shape: Shape, mesh: Sequence[int], place: Sequence[int], cuts: Sequence[Cut | None]
    ) -> Box:
        """The box that one process of a mesh holds.

        >>> Box.at((5, 3), mesh=(2, 2), place=(1, 0), cuts=(Cut(0, split_factor=2), Cut(0)))
        Box(shape=(5, 3), sizes=(1, 3), offsets=(2, 0))

        Args:
            shape: of the whole tensor.
            mesh: the number of processes along each of its dimensions.
            place: the number of this process along each.
            cuts: what each does with the tensor; None where all processes have the same.

        Raises:
            ValueError: a `split_factor` is none of the numbers of parts there are.
        """
        sizes, offsets = list(shape), [0] * len(shape)
        for index, dim in _in_order(mesh, cuts):
            begin, sizes[dim] = _part(sizes[dim], mesh[index], place[index])
            offsets[dim] += begin
        return cls(shape, tuple(sizes), tuple(offsets))

    @property
    def numel(self) -> int:
        """The number of its elements."""
        return math.prod(self.sizes)

    @property
    def slices(self) -> tuple[slice, ...]:
        """What selects the box from the whole tensor."""
        return tuple(
            slice(begin, begin + size) for begin, size in zip(self.offsets, self.sizes, strict=True)
        )

    def overlap(self, other: Box) -> Box:
        """The elements that two boxes of one tensor share; of no size where there are none."""
        bounds = [
            (max(a, b), min(a + m, b + n))
            for a, m, b, n in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)
        ]
        sizes = tuple(max(0, end - begin) for begin, end in bounds)
        return Box(self.shape, sizes, tuple(begin for begin, _ in bounds))

    def inside(self, other: Box) -> tuple[slice, ...]:
        """What selects the box from a tensor of another one's elements, which has all of it."""
        begins = [a - b for a, b in zip(self.offsets, other.offsets, strict=True)]
        pairs = zip(begins, self.sizes, strict=True)
        return tuple(slice(begin, begin + size) for begin, size in pairs)

    def run_starts(self, inner: int) -> list[int]:
        """Where in the whole tensor its runs begin, which span the dimensions from `inner` on."""
        starts = [0]
        for d, size in enumerate(self.sizes[:inner]):
            step = math.prod(self.shape[d + 1 :])
            starts = [s + (self.offsets[d] + i) * step for s in starts for i in range(size)]
        rest = sum(
            o * math.prod(self.shape[d + 1 :]) for d, o in enumerate(self.offsets) if d >= inner
        )
        return [start + rest for start in starts]

    def runs(self) -> Runs | None:
        """Its elements as runs of the whole tensor; None where they are at unequal distances."""
        cut = [d for d, size in enumerate(self.shape) if self.sizes[d] != size]
        inner = max(cut, default=0)
        if any(0 < d < inner for d in cut):
            return None
        strides = [math.prod(self.shape[d + 1 :]) for d in range(len(self.shape))]
        first = sum(o * s for o, s in zip(self.offsets, strides, strict=True))
        if inner == 0:
            return Runs(1, self.numel, first, 0)
        length = math.prod(self.sizes[inner:])
        stride = self.shape[inner] * strides[inner]
        return Runs(math.prod(self.sizes[:inner]), length, first, stride)


@lru_cache(maxsize=4096)
def all_boxes(shape: Shape, mesh: Shape, cuts: tuple[Cut | None, ...]) -> tuple[Box, ...]:
    """The boxes of all processes of a mesh, the last dimension's number running fastest."""
    places = itertools.product(*map(range, mesh))
    return tuple(Box.at(shape, mesh, place, cuts) for place in places)


def _part(size: int, parts: int, number: int) -> tuple[int, int]:
    """Where one of several parts begins, and its size, as `torch.chunk` cuts.

    All parts are as large as the first, until nothing is left: the last may be smaller, or empty.
    """
    share = -(-size // parts)
    begin = min(number * share, size)
    return begin, min(share, size - begin)


def _in_order(mesh: Sequence[int], cuts: Sequence[Cut | None]) -> list[tuple[int, int]]:
    """The dimensions of a mesh that cut, first to last, with those of the tensor that they cut."""
    order: list[tuple[int, int]] = []
    for index in reversed(range(len(cuts))):
        cut = cuts[index]
        if cut is None:
            continue
        place, parts = 0, 1
        while parts < cut.split_factor and place < len(order):
            before, dim = order[place]
            parts *= mesh[before] if dim == cut.dim else 1
            place += 1
        if parts != cut.split_factor:
            raise ValueError(
                f"split_factor {cut.split_factor} of dimension {index} of the mesh {tuple(mesh)} "
                f"is no number of parts that later ones cut dimension {cut.dim} into"
            )
        order.insert(place, (index, cut.dim))
    return order
