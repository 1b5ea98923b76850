"""The box of a tensor's elements that one process holds, in plain numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

Shape = tuple[int, ...]


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
