"""The memory that an orthogonalization needs beside its matrices."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from optfactory.matrix.products import multiplies_rounded

Shape = tuple[int, int]

# From this ratio of sides on, iterating on the Gram matrix takes less work. Squarer matrices also
# have smaller singular values, whose squares it would have to keep.
_GRAM_RATIO = 1.5

# Tensors begin at multiples of this many bytes, as those of torch's allocators do.
_ALIGNMENT = 64


def prefers_gram(shape: Shape) -> bool:
    """Whether a matrix of this shape is orthogonalized by way of its Gram matrix, in float32."""
    return max(shape) >= _GRAM_RATIO * min(shape)


@dataclass(frozen=True)
class Layout:
    """The tensors of one call, by shape and dtype, one behind the other in scratch memory.

    Matrices are [batch, rows, cols], squares [batch, n, n] with n = min(rows, cols).

    Attributes:
        matrices: dtypes of the tensors of the matrices' shape.
        squares: dtypes of the square tensors.
    """

    batch: int
    rows: int
    cols: int
    matrices: tuple[torch.dtype, ...]
    squares: tuple[torch.dtype, ...]

    @classmethod
    def of(cls, batch: int, shape: Shape, dtype: torch.dtype, device: torch.device | str) -> Layout:
        """What matrices need whose products have operands of this dtype, on this device."""
        rounded: tuple[torch.dtype, ...] = ()
        squares = 4 if prefers_gram(shape) else 2
        if dtype != torch.float32:
            rounded = (dtype,) if multiplies_rounded(device) else (dtype, torch.float32)
            squares = 2
        floats = (torch.float32,)
        return cls(batch, *shape, floats + rounded, floats * squares + rounded)

    @property
    def shapes(self) -> Iterator[tuple[tuple[int, int, int], torch.dtype]]:
        """The shape and dtype of every tensor: the matrices' first."""
        side = min(self.rows, self.cols)
        for dtype in self.matrices:
            yield (self.batch, self.rows, self.cols), dtype
        for dtype in self.squares:
            yield (self.batch, side, side), dtype

    @property
    def nbytes(self) -> int:
        """All bytes, with the gaps that align each tensor."""
        return sum(aligned(math.prod(shape) * dtype.itemsize) for shape, dtype in self.shapes)

    def carve(self, scratch: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The matrices and the squares, as views into a uint8 tensor of at least `nbytes`."""
        views, start = [], 0
        for shape, dtype in self.shapes:
            size = math.prod(shape) * dtype.itemsize
            views.append(scratch[start : start + size].view(dtype).view(shape))
            start += aligned(size)
        return views[: len(self.matrices)], views[len(self.matrices) :]


def scratch_bytes(
    batch: int, shape: Shape, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> int:
    """Bytes that `orthogonalize` needs beside x and its result, to the byte.

    Args:
        batch: the number of matrices.
        shape: rows and columns of each.
        dtype: of the products' operands, float32 or bfloat16.
        device: the matrices' own.
    """
    return Layout.of(batch, shape, dtype, device).nbytes


def aligned(nbytes: int) -> int:
    """So many bytes, and those up to where the next tensor may begin."""
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
