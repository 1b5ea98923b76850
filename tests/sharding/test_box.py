"""The box of a tensor's elements that a process holds, against torch.chunk and torch's own."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from optfactory.sharding.box import Box, Cut
from optfactory.sharding.dtensors import Sharding
from optfactory.sharding.planned import PlannedMesh

SHAPES = [(1,), (5,), (12,), (0,), (1, 3), (3, 1), (5, 7), (8, 6), (0, 4), (4, 3, 5), (2, 0, 3)]
MESHES = [(1,), (2,), (3,), (4,), (2, 2), (1, 2), (2, 1), (2, 4), (4, 2), (3, 2)]

Steps = Sequence[tuple[int, int]]  # which dimension of the mesh cuts which of the tensor, in order


def in_chunks(
    shape: tuple[int, ...], mesh: Sequence[int], place: Sequence[int], steps: Steps
) -> Tensor:
    """The elements, by number, that are left to a process after one torch.chunk a step."""
    elements = torch.arange(math.prod(shape)).view(shape)
    for index, dim in steps:
        chunks = elements.chunk(mesh[index], dim)
        mine = place[index]
        empty = elements.narrow(dim, 0, 0)
        elements = chunks[mine] if mine < len(chunks) else empty
    return elements


def of_box(box: Box) -> Tensor:
    return torch.arange(math.prod(box.shape)).view(box.shape)[box.slices]


def places(mesh: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    return itertools.product(*map(range, mesh))


def dims(shape: tuple[int, ...]) -> list[int | None]:
    return [None, *range(len(shape))]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_plain_cuts_are_chunks_in_the_order_of_the_mesh(
    shape: tuple[int, ...], mesh: tuple[int, ...]
) -> None:
    for chosen in itertools.product(dims(shape), repeat=len(mesh)):
        cuts = [None if dim is None else Cut(dim) for dim in chosen]
        steps = [(index, dim) for index, dim in enumerate(chosen) if dim is not None]
        placements = [Replicate() if dim is None else Shard(dim) for dim in chosen]
        for place in places(mesh):
            box = Box.at(shape, mesh, place, cuts)
            assert torch.equal(of_box(box), in_chunks(shape, mesh, place, steps))
            sizes, offsets = _compute_local_shape_and_global_offset(shape, mesh, place, placements)
            assert box.sizes == sizes
            assert box.offsets == offsets or not box.numel


@pytest.mark.parametrize("mesh", [mesh for mesh in MESHES if len(mesh) == 2], ids=str)
@pytest.mark.parametrize("size", [0, 1, 2, 3, 5, 6, 9, 10, 13, 16, 250, 251])
def test_strided_cuts_come_after_those_of_later_dimensions(
    size: int, mesh: tuple[int, int]
) -> None:
    cuts = [Cut(0, split_factor=mesh[1]), Cut(0)]
    placements = [_StridedShard(0, split_factor=mesh[1]), Shard(0)]
    held = []
    for place in places(mesh):
        box = Box.at((size, 3), mesh, place, cuts)
        assert torch.equal(of_box(box), in_chunks((size, 3), mesh, place, [(1, 0), (0, 0)]))
        held.append(of_box(box).flatten())
        if max(mesh) == 2:
            sizes, offsets = _compute_local_shape_and_global_offset(
                (size, 3), mesh, place, placements
            )
            assert box.sizes == sizes
            assert box.offsets == offsets or not box.numel
    assert torch.equal(torch.cat(held).sort().values, torch.arange(3 * size))


def test_short_parts_are_those_that_fully_shard_makes() -> None:
    # 9 rows, tensor parallel 2 within FSDP2 over 4, as the ranks of such a mesh hold them. Torch's
    # own formula gives the last row to rank 6 instead of rank 7.
    rows = [Box.at((9, 7), (4, 2), place, [Cut(0, 2), Cut(0)]).sizes[0] for place in places((4, 2))]
    assert rows == [2, 1, 2, 1, 1, 1, 0, 1]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_any_order_of_three_dimensions_can_be_said(order: tuple[int, ...]) -> None:
    mesh, shape = (2, 3, 2), (29, 2)
    # Those that cut before, among the later dimensions of the mesh.
    factors = [
        math.prod(mesh[other] for other in order[: order.index(index)] if other > index)
        for index in range(3)
    ]
    cuts = [Cut(0, factor) for factor in factors]
    steps = [(index, 0) for index in order]
    for place in places(mesh):
        assert torch.equal(
            of_box(Box.at(shape, mesh, place, cuts)), in_chunks(shape, mesh, place, steps)
        )


def test_a_strided_cut_does_not_count_cuts_of_other_dimensions() -> None:
    cuts = [Cut(0, split_factor=2), Cut(1), Cut(0)]
    for place in places((2, 3, 2)):
        steps = [(2, 0), (0, 0), (1, 1)]
        assert torch.equal(
            of_box(Box.at((7, 8), (2, 3, 2), place, cuts)),
            in_chunks((7, 8), (2, 3, 2), place, steps),
        )


@pytest.mark.parametrize("cuts", [[Cut(0, 3), Cut(0)], [Cut(0, 2), None], [Cut(0), Cut(0, 2)]])
def test_a_factor_without_such_parts_is_refused(cuts: list[Cut | None]) -> None:
    with pytest.raises(ValueError, match="is no number of parts"):
        Box.at((8, 8), (2, 2), (0, 0), cuts)


def test_a_planned_mesh_says_what_a_device_mesh_says() -> None:
    meshes = list(PlannedMesh.all_of((2, 3)))
    assert [mesh.get_coordinate() for mesh in meshes] == [
        *([0, 0], [0, 1], [0, 2]),
        *([1, 0], [1, 1], [1, 2]),
    ]
    assert {(mesh.ndim, mesh.size(), mesh.size(0), mesh.size(1)) for mesh in meshes} == {
        (2, 6, 2, 3)
    }
    placements = [(Cut(0), None), (Shard(0), Replicate()), (_StridedShard(1, split_factor=1), None)]
    for mesh in meshes:
        rows, same, columns = (Sharding((5, 9), mesh, pair).box for pair in placements)
        assert rows == same == Box.at((5, 9), (2, 3), mesh.place, (Cut(0), None))
        assert columns.sizes == (5, 5 - mesh.place[0])
