"""A bucket whose directions are made of whole matrices, as smaller buckets around products.

A batch of parameters goes through three passes: the rule writes its directions into scratch memory,
which stands in the place of the parameters; matrix products make them orthogonal there; and they
take the place of gradients for the step. The first and the last are updates as any other, by the
kernels of the bucket's backend, of what this process holds. Where that is parts of matrices, they
are exchanged in between (`optfactory.step.assembly`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from optfactory.matrix.orthogonalize import Orthogonalization, orthogonalize
from optfactory.matrix.packing import StackBatch
from optfactory.matrix.scratch import aligned
from optfactory.matrix.stacks import factor_of, how_of
from optfactory.rules.parts import STEP_PART, RulePart, direction_part
from optfactory.sharding.dtensors import Sharding
from optfactory.sharding.team import Team
from optfactory.state.layout import StateLayout
from optfactory.step.assembly import Assembly
from optfactory.step.batches import Packed, TeamRoom
from optfactory.step.buckets import Bucket, bucket_key
from optfactory.step.neurons import Neurons
from optfactory.step.owners import are_whole, owners_of, spread_of, stack_for
from optfactory.step.slots import Slot


class DirectionBucket(Bucket):
    """Writes directions where parameters are: p <- 0 p + u."""

    def _rule_scalars(self, slot: Slot, group: dict[str, Any], step: Any) -> dict[str, Any]:
        own = super()._rule_scalars(slot, group, step)
        return {**own, "decay": 0.0, "step_size": -1.0}


@dataclass(frozen=True)
class MatrixWork:
    """One batch of a bucket's parameters.

    Attributes:
        members: their numbers in the bucket.
        direction, step: the buckets before and behind the products.
        counters: of the steps behind the products; others than the states', which the first pass
            advances.
        parts: what this process has of the directions, in scratch memory.
        stack: the matrices that it multiplies, there too: [count, rows, cols].
        together, scratch: how many are multiplied at once, and what that needs.
        how, factor: what is done to each.
        neurons: what their rows are scaled by; None if all by the factor alone.
        assembly: of matrices whose parts are spread over processes; None if `stack` is `parts`.
        order: by which batches are sorted, the same on all processes that have a part in them.
    """

    members: tuple[int, ...]
    direction: Bucket
    step: Bucket
    counters: list[Tensor]
    parts: Tensor
    stack: Tensor
    together: int
    scratch: Tensor
    how: Orthogonalization
    factor: float
    neurons: Neurons | None
    assembly: Assembly | None
    order: tuple[int, int]

    def follow(self, bucket: Bucket) -> None:
        """Take what is so of the bucket in this step."""
        slots = [bucket.slots[n] for n in self.members]
        parts = (self.direction, self.step)
        for slot, before, behind in zip(slots, *(part.slots for part in parts), strict=True):
            before.state = slot.state
            kept = behind.layout.kept_key
            if kept:
                behind.state[kept] = slot.state[kept]
        if self.neurons is not None:
            self.neurons.follow(slots)
        for part in parts:
            part.found_inf = bucket.found_inf
        self.direction.grad_scale = bucket.grad_scale
        self.direction.gradients = [bucket.gradients[n] for n in self.members]
        self.direction.gradient_addresses = [bucket.gradient_addresses[n] for n in self.members]
        self.step.parameters = [bucket.parameters[n] for n in self.members]
        self.step.parameter_addresses = [bucket.parameter_addresses[n] for n in self.members]

    def begin(self) -> None:
        """Before the first pass: what is there must be finite, as it is multiplied by 0."""
        self.parts.zero_()
        torch._foreach_copy_(self.counters, [slot.state["step"] for slot in self.direction.slots])

    def transform(self) -> None:
        """Make the directions orthogonal, in place."""
        if self.assembly is not None:
            self.assembly.gather()
        for first in range(0, len(self.stack), self.together):
            some = self.stack[first : first + self.together]
            orthogonalize(some, self.how, out=some, scratch=self.scratch)
        if self.neurons is None:
            self.stack.mul_(self.factor)
        else:
            self.neurons.scale(self.stack, self.factor, self.direction.found_inf)
        if self.assembly is not None:
            self.assembly.scatter()

    def release(self) -> None:
        """Let go of the step's gradients."""
        self.direction.gradients = []
        self.direction.grad_scale = self.direction.found_inf = self.step.found_inf = None


class MatrixSteps:
    """The batches of one bucket, kept as long as its parameters stay."""

    def __init__(self, bucket: Bucket, packed: Packed, memory: Tensor) -> None:
        self.memory = memory
        self.works = [
            _work(bucket, team, batch, memory)
            for team, batches in packed.items()
            for batch in batches
        ]

    def follow(self, bucket: Bucket) -> list[MatrixWork]:
        """The batches, ready for this step."""
        for work in self.works:
            work.follow(bucket)
        return self.works

    def release(self) -> None:
        """Let go of the step's gradients."""
        for work in self.works:
            work.release()


def _work(bucket: Bucket, team: Team | None, batch: StackBatch, memory: Tensor) -> MatrixWork:
    slots = [bucket.slots[n] for n in batch.members]
    device, first, group = bucket.key.device, stack_for(slots[0]), slots[0].group
    shapes = [slot.layout.local_shape for slot in slots]
    sizes = list(map(math.prod, shapes))
    elements = memory[: 4 * sum(sizes)].view(torch.float32)
    pieces = torch.split(elements, sizes)
    views = [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
    if team is None or are_whole(slots[0]):
        assembly, scratch = None, memory[aligned(elements.nbytes) :]
        stack = elements.view(elements.numel() // (first.rows * first.cols), first.rows, first.cols)
    else:
        stack, scratch = _room(slots, team, memory)
        assembly = Assembly(
            team,
            [spread_of(slot) for slot in slots],
            [slot.layout.piece.box for slot in slots if slot.layout.piece is not None],
            views,
            stack,
            scratch,
        )
    before = [_before(slot, view) for slot, view in zip(slots, views, strict=True)]
    behind = [_behind(slot, device) for slot in slots]
    gradient = torch.empty(0, dtype=bucket.key.gradient, device=device)
    direction = DirectionBucket(bucket_key(before[0], gradient), before)
    step = Bucket(bucket_key(behind[0], views[0]), behind)
    direction.parameters, step.gradients = list(views), list(views)
    addresses = list(map(Tensor.data_ptr, views))
    direction.parameter_addresses, step.gradient_addresses = addresses, addresses
    return MatrixWork(
        members=batch.members,
        direction=direction,
        step=step,
        counters=[slot.state["step"] for slot in behind],
        parts=elements,
        stack=stack,
        together=batch.together,
        scratch=scratch,
        how=how_of(group, device),
        factor=factor_of(first, group),
        neurons=Neurons(slots, team, device) if group["neuron_norm"] else None,
        assembly=assembly,
        order=(bucket.key.turn, -1 if team is None else slots[0].number),
    )


def _room(slots: Sequence[Slot], team: Team, memory: Tensor) -> tuple[Tensor, Tensor]:
    """The matrices that this process owns, behind its parts, and what is left behind them."""
    first = stack_for(slots[0])
    room = TeamRoom(slots, memory.device)
    parts, whole = room.own(range(len(slots)))
    count = owners_of(m for slot in slots for m in spread_of(slot)).count(team.number)
    numel = count * first.rows * first.cols
    owned = memory[parts : parts + 4 * numel].view(torch.float32)
    return owned.view(count, first.rows, first.cols), memory[parts + whole :]


def _before(slot: Slot, view: Tensor) -> Slot:
    """The parameter's place in the pass that makes directions: its state, and scratch memory."""
    layout = _layout(slot, torch.float32, direction_part(slot.layout.rule))
    return replace(slot, parameter=view, layout=layout, held=None)


def _behind(slot: Slot, device: torch.device) -> Slot:
    """The parameter's place in the pass that steps."""
    layout = _layout(slot, slot.local.dtype, STEP_PART)
    state = {"step": layout.tensors["step"].allocate(device, None)}
    return replace(slot, layout=layout, state=state, held=None)


def _layout(slot: Slot, dtype: torch.dtype, part: RulePart) -> StateLayout:
    group = {**slot.group, **part.settings}
    facts = (slot.layout.shape, slot.local.device, dtype)
    return StateLayout.of_rule(*facts, part.rule, group, Sharding.of(slot.parameter))
