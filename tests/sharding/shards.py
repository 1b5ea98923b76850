"""All shards of a model's tensors in one process, beside the whole tensors.

What processes would exchange between passes is exchanged here by hand.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optfactory import backends, build_optimizer
from optfactory.backends.base import Backend, Findings
from optfactory.sharding.dtensors import Sharding
from optfactory.state.layout import StateLayout
from optfactory.step.buckets import Bucket
from optfactory.step.plan import StepPlan
from optfactory.step.slots import Slot

Shape = tuple[int, ...]


@dataclass(frozen=True)
class FakeMesh:
    """What a DeviceMesh says of one of its processes, without any process."""

    shape: Shape
    coordinate: Shape

    def size(self, dim: int) -> int:
        return self.shape[dim]

    def get_group(self, dim: int) -> str:
        return f"group of dimension {dim}"

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def get_coordinate(self) -> list[int]:
        return list(self.coordinate)


@dataclass(frozen=True)
class Spread:
    """A tensor and how a mesh cuts it.

    Attributes:
        shape: of the whole tensor.
        mesh: the mesh's shape.
        dims: which dimension of the tensor each of the mesh cuts.
    """

    shape: Shape
    mesh: Shape
    dims: Shape

    def shardings(self) -> list[Sharding]:
        """That of each process."""
        from torch.distributed.tensor import Shard

        ranks = itertools.product(*map(range, self.mesh))
        placements = tuple(map(Shard, self.dims))
        return [Sharding(self.shape, FakeMesh(self.mesh, rank), placements) for rank in ranks]


class Shards:
    """The processes that hold the shards of an optimizer's tensors, and the optimizer itself.

    Args:
        spreads: how each tensor is cut; all over as many processes.
    """

    def __init__(
        self, name: str, spreads: Sequence[Spread], dtype: torch.dtype, **asked: Any
    ) -> None:
        values = [random(spread.shape, dtype, i) for i, spread in enumerate(spreads)]
        self.spreads, self.dtype = spreads, dtype
        self.whole = [value.clone().requires_grad_() for value in values]
        self.optimizer = build_optimizer(name, self.whole, **asked)
        self.optimizer.init_states()
        family = self.optimizer._current_plan().slots[0].schema
        ways = [spread.shardings() for spread in spreads]
        self.plans = [
            StepPlan([self._slot(n, own, family) for n, own in enumerate(rank)])
            for rank in zip(*ways, strict=True)
        ]
        self.backend = backends.backend_for(self.whole[0].device)

    def _slot(self, number: int, sharding: Sharding, family: Any) -> Slot:
        (group,), p = self.optimizer.param_groups, self.whole[number]
        facts = (tuple(p.shape), p.device, p.dtype, family, group)
        layout = StateLayout.of(*facts, sharding)
        local = p.detach()[sharding.box.slices].clone(memory_format=torch.contiguous_format)
        state = layout.allocate(p.device, None)
        return Slot(local.requires_grad_(), f"p{number}", number, group, family, layout, state)

    def slots(self, number: int) -> list[Slot]:
        """The shards of one tensor."""
        return [plan.slots[number] for plan in self.plans]

    def give_gradients(self, seed: int, strided: bool = False) -> None:
        """New gradients, and each process its part; a view into the whole one if `strided`."""
        for number, p in enumerate(self.whole):
            g = random(tuple(p.shape), self.dtype, 1000 * (seed + 1) + number)
            p.grad = g
            for slot in self.slots(number):
                assert slot.layout.piece is not None
                part = g[slot.layout.piece.box.slices]
                slot.parameter.grad = part if strided else part.contiguous().clone()

    def buckets(self) -> list[list[Bucket]]:
        """Each bucket as all processes have it."""
        all_ranks = [plan.gather() for plan in self.plans]
        for own in all_ranks:
            self.backend.prepare(own)
        same = list(zip(*all_ranks, strict=True))
        for ranks in same:
            assert len({tuple(s.number for s in bucket.slots) for bucket in ranks}) == 1
        return [list(ranks) for ranks in same]

    def step(self) -> None:
        """A step of the whole tensors, and one of all processes."""
        self.optimizer.step()
        for ranks in self.buckets():
            run_together(self.backend, ranks)

    def assert_same(self) -> None:
        """Parameters, codes, scales and all other state are the same bits."""
        for number, p in enumerate(self.whole):
            for slot in self.slots(number):
                piece, state = slot.layout.piece, self.optimizer.state[p]
                assert piece is not None
                box, scales = piece.box, piece.scales.box
                assert_bits(slot.parameter, p[box.slices], f"parameter {number}")
                assert state.keys() == slot.state.keys()
                for key, part in slot.state.items():
                    value = state[key]
                    if slot.layout.tensors[key].sharding is not None:
                        value = value[scales.slices if key.endswith("absmax") else box.slices]
                    assert_bits(part, value, f"{key} of parameter {number} {piece.sharding.mesh}")


def run_together(backend: Backend, ranks: Sequence[Bucket]) -> list[Findings]:
    """Update a bucket of all processes; returns what the first one found."""
    running = [backend.update(bucket) for bucket in ranks]
    seen = []
    for findings in pauses(running):
        complete(ranks, findings)
        seen.append(findings[0])
    return seen


def pauses(running: list[Iterator[Findings]]) -> Iterator[list[Findings]]:
    """What all processes found at each pause, which all must have."""
    while True:
        found = [next(process, None) for process in running]
        if not any(found):
            return
        yield [item for item in found if item is not None]
        assert all(found)


def complete(ranks: Sequence[Bucket], findings: list[Findings]) -> None:
    """Give all processes the sums, and the maxima of the tensors or blocks that they share."""
    if findings[0].sums is not None:
        total = torch.stack([f.sums for f in findings]).sum(dim=0)  # type: ignore[misc]
        for found in findings:
            assert found.sums is not None
            assert found.sums.is_contiguous()
            assert found.sums.shape[0] == len(ranks[0].slots)
            found.sums.copy_(total)
    shared: dict[Any, list[Tensor]] = {}
    for bucket, found in zip(ranks, findings, strict=True):
        for number, maxima in found.maxima:
            piece = bucket.slots[number].layout.piece
            assert piece is not None
            shared.setdefault((number, piece.scales.box), []).append(maxima)
    for parts in shared.values():
        greatest = torch.stack(parts).amax(dim=0)
        for part in parts:
            part.copy_(greatest)


def random(shape: Shape, dtype: torch.dtype, seed: int) -> Tensor:
    """Normal numbers, some of them large and some 0."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, device="cpu")
    large = torch.rand(shape, generator=generator, device="cpu")
    x = torch.where(large < 0.01, 30 * x, torch.where(large > 0.95, 0.0, x))
    return x.to(dtype).to(torch.get_default_device())


def assert_bits(one: Tensor, other: Tensor, what: str) -> None:
    assert one.dtype == other.dtype
    assert one.shape == other.shape, what
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    a, b = (x.detach().contiguous().view(kinds[x.element_size()]) for x in (one, other))
    differs = int((a != b).sum())
    assert differs == 0, f"{what}: {differs} of {a.numel()} differ"
