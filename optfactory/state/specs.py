"""State tensors: their keys, shapes and places."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from optfactory.memory import placement
from optfactory.memory.presence import memory_problem
from optfactory.sharding.dtensors import Sharding
from optfactory.state.codec import BlockGrid
from optfactory.state.pieces import Piece

# Squared gradient norms of percentile clipping, what is kept beside 16-bit parameters (what storing
# them lost, the lower half of a float32 master, all of one), and second moments of the rows of
# directions that are made of matrices.
HISTORY_KEY = "gnorm_vec"
LOSS_KEY = "compensation"
LOW_KEY = "master_low"
MASTER_KEY = "master"
NEURONS_KEY = "neuron_second_moment"
KEPT_KEYS = (LOSS_KEY, LOW_KEY, MASTER_KEY)
EXTRA_KEYS = (HISTORY_KEY, *KEPT_KEYS, NEURONS_KEY)


@dataclass(frozen=True)
class TensorSpec:
    """One state tensor: dtype, shape, where it lives and what it is filled with at first.

    With `on_device` it is kept on the parameter's device, otherwise on the CPU. Where a process
    holds a part of it, `shape` is the part's, and `sharding` says of what.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    where: str = placement.RESIDENT
    fill: float = field(default=0, compare=False)
    on_device: bool = True
    sharding: Sharding | None = None

    @property
    def nbytes(self) -> int:
        """Size in bytes, of what is here."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def global_nbytes(self) -> int:
        """Size in bytes of the whole, as one process has it."""
        shape = self.shape if self.sharding is None else self.sharding.shape
        return math.prod(shape) * self.dtype.itemsize

    def problem(self, value: object) -> str:
        """Why a value cannot be this state tensor; empty if it can."""
        if not isinstance(value, Tensor):
            return f"expected a tensor, got {type(value).__name__}"
        if value.dtype != self.dtype:
            return f"expected {self.dtype}, got {value.dtype}"
        if tuple(value.shape) != self.shape:
            return f"expected shape {self.shape}, got {tuple(value.shape)}"
        if value.layout is not torch.strided or value.device.type == "meta":
            return f"expected dense data, got layout {value.layout} on device '{value.device}'"
        if hasattr(value, "device_mesh"):
            return "is a DTensor; sharded state is not supported yet"
        if is_traceable_wrapper_subclass(value):
            return f"expected a plain tensor, got {type(value).__name__}"
        return memory_problem(value)

    def home(self, device: torch.device) -> torch.device:
        """Where the tensor is for a parameter on this device."""
        follows = self.on_device and self.where != placement.PINNED
        return device if follows else torch.device("cpu")

    def allocate(self, device: torch.device, page_dir: str | None) -> Tensor:
        """A fresh tensor for a parameter on this device."""
        home = device if self.on_device else torch.device("cpu")
        with torch.inference_mode(False):  # or a step outside could not write to it
            return placement.allocate(self.shape, self.dtype, home, self.where, page_dir, self.fill)


def pairs_of(shape: tuple[int, ...]) -> BlockGrid:
    """A tensor's pairs of neighbours in its rows, as a grid of blocks."""
    return BlockGrid.of(shape, 2)


@dataclass(frozen=True)
class Extents:
    """Shapes of elements, scales and pairs of elements here, and the tensors that these are of."""

    elements: tuple[int, ...]
    scales: tuple[int, ...]
    pairs: tuple[int, ...]
    elements_of: Sharding | None
    scales_of: Sharding | None
    pairs_of: Sharding | None

    @classmethod
    def of(cls, shape: tuple[int, ...], grid: BlockGrid, piece: Piece | None) -> Extents:
        if piece is None:
            return cls(shape, grid.scales_shape, pairs_of(shape).scales_shape, None, None, None)
        pairs = () if piece.pairs is None else piece.pairs.box.sizes
        own = (piece.box.sizes, piece.scales.box.sizes, pairs)
        return cls(*own, piece.sharding, piece.scales, piece.pairs)


def kept_beside(
    rounding: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    where: str,
    sharding: Sharding | None,
) -> dict[str, TensorSpec]:
    """What is kept beside a parameter that is stored so; see `KernelOptions.rounding`.

    A master begins with zeros: of an element that does not round to the parameter's, the parameter
    is taken. On CPUs masters are paged as states are; on GPUs states alone travel.
    """
    paged = where if where == placement.FILE_MAPPED else placement.RESIDENT
    found = {
        "kahan": (LOSS_KEY, dtype, placement.RESIDENT),
        "split": (LOW_KEY, torch.int16, paged),
        "fp32": (MASTER_KEY, torch.float32, paged),
    }
    if rounding not in found:
        return {}
    key, kind, place = found[rounding]
    return {key: TensorSpec(kind, shape, place, sharding=sharding)}
