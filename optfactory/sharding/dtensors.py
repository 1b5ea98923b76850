"""What a DTensor says of itself, and its local tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from optfactory.sharding.box import Box, Cut, Shape
from optfactory.sharding.planned import PlannedMesh
from optfactory.sharding.team import Team


def is_dtensor(value: object) -> bool:
    """Whether a value is a tensor of torch.distributed.tensor; does not import that module."""
    return isinstance(value, Tensor) and hasattr(value, "_spec") and hasattr(value, "device_mesh")


def local_tensor(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds; an ordinary tensor is all there.

    It is the DTensor's own tensor, not a fresh view as of `to_local()`: what is written to it is
    written to the DTensor, and it is the same object until an engine swaps it.
    """
    return tensor._local_tensor if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def local_values(tensor: Tensor) -> Tensor:
    """The local part to be read, when a collective that is on its way has come in."""
    local = local_tensor(tensor)
    return local if type(local) is Tensor else tensor.to_local()  # type: ignore[attr-defined]


def sharded_dim(placement: Any) -> int | None:
    """The tensor dimension that a placement cuts; None for those that copy or sum.

    `_StridedShard` is no `Shard`, and both have a `dim`.
    """
    dim = getattr(placement, "dim", None)
    return dim if isinstance(dim, int) else None


def _cut(placement: Any) -> Cut | None:
    dim = sharded_dim(placement)
    return None if dim is None else Cut(dim, getattr(placement, "split_factor", 1))


@dataclass(frozen=True)
class Sharding:
    """How a tensor is spread over the processes of a mesh.

    Attributes:
        shape: of the whole tensor.
        mesh: a torch.distributed.DeviceMesh, or one of a plan.
        placements: what each dimension of the mesh does with the tensor, as torch has it, or as
            `Cut` or None in a plan.
    """

    shape: Shape
    mesh: Any
    placements: tuple[Any, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Sharding | None:
        """That of a DTensor; None for other tensors."""
        if not is_dtensor(tensor):
            return None
        spec = tensor._spec  # type: ignore[attr-defined]
        return cls(tuple(tensor.shape), spec.mesh, tuple(spec.placements))

    @cached_property
    def box(self) -> Box:
        """The elements that this process holds."""
        place = self.mesh.get_coordinate()
        if place is None:  # this process is none of the mesh's
            return Box(self.shape, (0,) * len(self.shape), (0,) * len(self.shape))
        sizes = [self.mesh.size(index) for index in range(self.mesh.ndim)]
        return Box.at(self.shape, sizes, place, [_cut(placement) for placement in self.placements])

    @cached_property
    def cuts(self) -> tuple[tuple[int, int], ...]:
        """Which dimensions of the mesh cut which of the tensor; those of one process cut none."""
        found = [
            (index, sharded_dim(placement))
            for index, placement in enumerate(self.placements)
            if self.mesh.size(index) > 1
        ]
        return tuple((index, dim) for index, dim in found if dim is not None)

    @property
    def team(self) -> Team:
        """The processes that hold different parts of the tensor, this one among them."""
        return Team(self.mesh, tuple(index for index, _ in self.cuts))

    @cached_property
    def team_cuts(self) -> tuple[Cut | None, ...]:
        """What each dimension of the team does with the tensor."""
        return tuple(_cut(self.placements[index]) for index, _ in self.cuts)

    @property
    def copied(self) -> Any:
        """The placement of what all processes along a dimension of the mesh have."""
        if isinstance(self.mesh, PlannedMesh):
            return None
        from torch.distributed.tensor import Replicate

        return Replicate()

    @property
    def groups(self) -> tuple[Any, ...]:
        """The process groups whose members hold different parts of the tensor."""
        return self.groups_of(index for index, _ in self.cuts)

    def groups_of(self, mesh_dims: Iterator[int]) -> tuple[Any, ...]:
        """The process groups of some dimensions of the mesh."""
        return tuple(self.mesh.get_group(index) for index in mesh_dims)

    def wrap(self, local: Tensor) -> Tensor:
        """The DTensor of this sharding that has a tensor for its local part, without a copy.

        `DTensor.from_local` would move it to the mesh's device, where CPU offload keeps it on CPUs.
        """
        from torch.distributed.tensor import DTensor
        from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

        meta = TensorMeta(torch.Size(self.shape), _row_major(self.shape), local.dtype)
        spec = DTensorSpec(self.mesh, self.placements, tensor_meta=meta)
        return DTensor(local, spec, requires_grad=False)  # type: ignore[no-untyped-call]


def _row_major(shape: Shape) -> tuple[int, ...]:
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))
