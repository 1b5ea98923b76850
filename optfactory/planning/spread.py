"""How a model will be spread over a mesh of ranks: what each of them will hold of every tensor."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor

from optfactory.config.validation import config_error
from optfactory.errors import ConfigError
from optfactory.sharding.box import Box, Cut
from optfactory.sharding.dtensors import Sharding, is_dtensor, sharded_dim
from optfactory.sharding.planned import PlannedMesh

MeshSizes = int | str | Sequence[int]
Placements = tuple[Cut | None, ...]
# By a name's glob, or from a tensor and its name; None leaves a tensor to the scheme.
PlacementsOf = Mapping[str, Sequence[Any]] | Callable[[str, Tensor], Sequence[Any] | None]

# What each scheme does, and for how many dimensions of a mesh it is.
SCHEMES = {
    "fsdp": ("every tensor is cut along its first dimension, as by fully_shard", (1,)),
    "hsdp": ("as fsdp over the second dimension; the first one holds copies", (2,)),
    "tp": (
        "matrices are cut along their first dimension over the mesh's last, as by a colwise Linear "
        "and a rowwise Embedding; all else is whole there. A dimension before is as fsdp",
        (1, 2),
    ),
}


class Holder:
    """One rank that plans its own part: a model as it is, sharded or not.

    Attributes:
        ranks: the numbers of all that hold equally much of every tensor.
    """

    ranks: tuple[int, ...] = (0,)

    def sharding(self, tensor: Tensor) -> Sharding | None:
        """How a tensor is spread; None where it is not."""
        return Sharding.of(tensor)

    def part(self, tensor: Tensor) -> Hashable:
        """What is equal for tensors of one shape exactly where their states have equal sizes."""
        return self.sharding(tensor)

    def held(self, tensor: Tensor, nbytes: int) -> int:
        """Bytes that are here, of those that a tensor has on this rank now."""
        return nbytes


@dataclass(frozen=True)
class PlannedHolder(Holder):
    """Ranks of a mesh that hold equally much of every tensor.

    Attributes:
        spread: of the model.
        mesh: as the first of them sees it.
    """

    spread: Spread
    mesh: PlannedMesh
    ranks: tuple[int, ...]
    _parts: dict[int, int] = field(default_factory=dict, repr=False)

    def sharding(self, tensor: Tensor) -> Sharding:
        return Sharding(tuple(tensor.shape), self.mesh, self.spread.placements[id(tensor)])

    def part(self, tensor: Tensor) -> Hashable:
        # Asked for every name and rank: numbers are compared faster than placements.
        if id(tensor) not in self._parts:
            part = (self.spread.placements[id(tensor)], self.spread.box(tensor, self.mesh).sizes)
            self._parts[id(tensor)] = self.spread.numbers.setdefault(part, len(self.spread.numbers))
        return self._parts[id(tensor)]

    def held(self, tensor: Tensor, nbytes: int) -> int:
        return nbytes * self.spread.box(tensor, self.mesh).numel // max(tensor.numel(), 1)


@dataclass(frozen=True)
class Spread:
    """A model's tensors on a mesh.

    Attributes:
        sizes: of the mesh.
        scheme: which tensors are cut, one of `SCHEMES`.
        placements: of each tensor, by its id.
        numbers: of the different parts that ranks hold.
    """

    sizes: tuple[int, ...]
    scheme: str
    placements: Mapping[int, Placements] = field(repr=False)
    numbers: dict[Hashable, int] = field(default_factory=dict, repr=False)
    _boxes: dict[Any, Box] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls,
        sizes: tuple[int, ...],
        scheme: str,
        tensors: Mapping[str, Tensor],
        placements: PlacementsOf | None,
    ) -> Spread:
        """The spread of tensors that have these names.

        Args:
            placements: where it is not the scheme's.

        Raises:
            ConfigError: lists all tensors that cannot be cut like this, and globs that match none.
        """
        problems = [
            f"{name}: is sharded already; plan it without mesh"
            for name, tensor in tensors.items()
            if is_dtensor(tensor)
        ]
        if isinstance(placements, Mapping):
            problems += [
                f"placements[{glob!r}]: matches no parameter"
                for glob in placements
                if not any(fnmatchcase(name, glob) for name in tensors)
            ]
        found = {}
        for name, tensor in tensors.items():
            try:
                found[id(tensor)] = _placements_of(name, tensor, sizes, scheme, placements)
            except ValueError as error:
                problems.append(f"{name}: {error}")
        if problems:
            raise config_error("the mesh", problems)
        return cls(sizes, scheme, found)

    def box(self, tensor: Tensor, mesh: PlannedMesh) -> Box:
        """The elements of a tensor that a rank will hold."""
        shape, placements = tuple(tensor.shape), self.placements[id(tensor)]
        key = (shape, placements, mesh.place)
        if key not in self._boxes:
            self._boxes[key] = Box.at(shape, self.sizes, mesh.place, placements)
        return self._boxes[key]

    def holders(self, tensors: Iterable[Tensor]) -> list[PlannedHolder]:
        """All ranks; those together that hold equally much of each of the tensors."""
        distinct = {(tuple(t.shape), self.placements[id(t)]): t for t in tensors}.values()
        found: dict[Any, tuple[PlannedMesh, list[int]]] = {}
        for rank, mesh in enumerate(PlannedMesh.all_of(self.sizes)):
            sizes = tuple(self.box(tensor, mesh).sizes for tensor in distinct)
            found.setdefault(sizes, (mesh, []))[1].append(rank)
        return [PlannedHolder(self, mesh, tuple(ranks)) for mesh, ranks in found.values()]


def read_mesh(mesh: MeshSizes | None) -> tuple[int, ...] | None:
    """The sizes of a mesh from 8, "8", "2x4" or (2, 4).

    Raises:
        ConfigError: it is none of these.
    """
    if mesh is None:
        return None
    sizes: Sequence[Any] = ()
    if isinstance(mesh, str):
        sizes = [int(n) for n in mesh.split("x")] if re.fullmatch(r"\d+(x\d+)?", mesh) else ()
    elif isinstance(mesh, Sequence):
        sizes = mesh
    else:
        sizes = [mesh]
    good = all(type(size) is int and 0 < size <= 1 << 20 for size in sizes)
    if not (good and 1 <= len(sizes) <= 2):
        raise ConfigError(
            "mesh is a number of ranks such as 8, or that of each of two dimensions such as '2x4', "
            f"got {mesh!r}"
        )
    return tuple(sizes)


def read_scheme(shard: str | None, sizes: tuple[int, ...] | None) -> str:
    """How tensors are cut; by default as FSDP on one dimension, and as HSDP on two.

    Raises:
        ConfigError: there is no such scheme, or none for such a mesh, or no mesh.
    """
    if shard is not None and shard not in SCHEMES:
        raise ConfigError(f"shard is one of {', '.join(SCHEMES)}, got {shard!r}")
    if sizes is None:
        if shard is not None:
            raise ConfigError(f"shard {shard!r} needs a mesh, such as mesh='8' or mesh='2x4'")
        return ""
    scheme = shard or {1: "fsdp", 2: "hsdp"}[len(sizes)]
    if len(sizes) not in SCHEMES[scheme][1]:
        allowed = [name for name, (_, ndims) in SCHEMES.items() if len(sizes) in ndims]
        text = "x".join(map(str, sizes))
        raise ConfigError(
            f"shard {scheme!r} is not for a mesh of {len(sizes)} dimension(s), {text}; "
            f"there it is one of {', '.join(allowed)}"
        )
    return scheme


def _placements_of(
    name: str,
    tensor: Tensor,
    sizes: tuple[int, ...],
    scheme: str,
    placements: PlacementsOf | None,
) -> Placements:
    """What each dimension of the mesh does with a tensor.

    Raises:
        ValueError: it cannot be.
    """
    stated = None
    if isinstance(placements, Mapping):
        globs = [glob for glob in placements if fnmatchcase(name, glob)]
        stated = placements[globs[-1]] if globs else None  # as with rules, the last one wins
    elif placements is not None:
        stated = placements(name, tensor)
    if stated is None:
        cuts = _by_scheme(scheme, tensor.ndim, sizes)
    else:
        cuts = _read_placements(stated, tensor.ndim, len(sizes))
    if tensor.ndim == 0 and any(cuts):
        raise ValueError("is a scalar, which fully_shard refuses; make it a tensor of one element")
    Box.at(tuple(tensor.shape), sizes, (0,) * len(sizes), cuts)
    return cuts


def _by_scheme(scheme: str, ndim: int, sizes: tuple[int, ...]) -> Placements:
    if scheme == "fsdp":
        return (Cut(0),)
    if scheme == "hsdp":
        return (None, Cut(0))
    last = Cut(0) if ndim == 2 else None
    if len(sizes) == 1:
        return (last,)
    return (Cut(0, sizes[1]) if last else Cut(0), last)


def _read_placements(stated: Sequence[Any], ndim: int, mesh_ndim: int) -> Placements:
    if not isinstance(stated, (list, tuple)) or len(stated) != mesh_ndim:
        raise ValueError(
            f"placements are one for each of {mesh_ndim} dimension(s) of the mesh, got {stated!r}"
        )
    cuts: list[Cut | None] = []
    for placement in stated:
        dim = sharded_dim(placement)
        whole = placement is None or getattr(placement, "is_replicate", bool)()
        if dim is None and not whole:
            raise ValueError(f"a placement is Shard(dim) or Replicate(), got {placement!r}")
        if dim is not None and not -ndim <= dim < ndim:
            raise ValueError(f"{placement!r} cuts dimension {dim} of {ndim}")
        factor = getattr(placement, "split_factor", 1)
        cuts.append(None if dim is None else Cut(dim % ndim, factor))
    return tuple(cuts)
