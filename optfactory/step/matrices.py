"""A bucket whose directions are made of whole matrices, as smaller buckets around products.

A batch of parameters goes through three passes: the rule writes its directions into scratch memory,
which stands in the place of the parameters; matrix products make them orthogonal there; and they
take the place of gradients for the step. The first and the last are updates as any other, by the
kernels of the bucket's backend.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from optfactory.errors import ConfigError
from optfactory.matrix.orthogonalize import Orthogonalization, orthogonalize
from optfactory.matrix.scratch import aligned
from optfactory.matrix.stacks import Stack, StackBatch, factor_of, how_of, pack, stack_of
from optfactory.rules.parts import STEP_PART, RulePart, direction_part
from optfactory.sharding.dtensors import Sharding
from optfactory.state.layout import LOSS_KEY, StateLayout
from optfactory.step.buckets import Bucket, bucket_key
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
        stack: the matrices, in scratch memory: [count, rows, cols].
        together, scratch: how many are multiplied at once, and what that needs.
        how, factor: what is done to each.
    """

    members: tuple[int, ...]
    direction: Bucket
    step: Bucket
    counters: list[Tensor]
    stack: Tensor
    together: int
    scratch: Tensor
    how: Orthogonalization
    factor: float

    def follow(self, bucket: Bucket) -> None:
        """Take what is so of the bucket in this step."""
        slots = [bucket.slots[n] for n in self.members]
        parts = (self.direction, self.step)
        for slot, before, behind in zip(slots, *(part.slots for part in parts), strict=True):
            before.state = slot.state
            if LOSS_KEY in behind.layout.tensors:
                behind.state[LOSS_KEY] = slot.state[LOSS_KEY]
        for part in parts:
            part.found_inf = bucket.found_inf
        self.direction.grad_scale = bucket.grad_scale
        self.direction.gradients = [bucket.gradients[n] for n in self.members]
        self.direction.gradient_addresses = [bucket.gradient_addresses[n] for n in self.members]
        self.step.parameters = [bucket.parameters[n] for n in self.members]
        self.step.parameter_addresses = [bucket.parameter_addresses[n] for n in self.members]

    def begin(self) -> None:
        """Before the first pass: what is there must be finite, as it is multiplied by 0."""
        self.stack.zero_()
        torch._foreach_copy_(self.counters, [slot.state["step"] for slot in self.direction.slots])

    def transform(self) -> None:
        """Make the directions orthogonal, in place."""
        for first in range(0, len(self.stack), self.together):
            some = self.stack[first : first + self.together]
            orthogonalize(some, self.how, out=some, scratch=self.scratch)
        self.stack.mul_(self.factor)

    def end(self) -> None:
        """Let go of the step's gradients."""
        self.direction.gradients = []
        self.direction.grad_scale = self.direction.found_inf = self.step.found_inf = None


class MatrixSteps:
    """The batches of one bucket, kept as long as its parameters stay."""

    def __init__(self, bucket: Bucket, memory: Tensor) -> None:
        self.memory = memory
        self.works = list(_works(bucket, memory))

    def follow(self, bucket: Bucket) -> list[MatrixWork]:
        """The batches, ready for this step."""
        for work in self.works:
            work.follow(bucket)
        return self.works


def batches_of(
    slots: Sequence[Slot], device: torch.device, limit: int | None = None
) -> list[StackBatch]:
    """How parameters share scratch memory.

    Args:
        limit: bytes; None is what their groups say.
    """
    groups = [slot.group for slot in slots]
    hows = [how_of(group, device) for group in groups]
    stated = [group["ns_memory"] for group in groups]
    return pack(
        [stack_for(slot) for slot in slots],
        [(how, group["adjust_lr"]) for how, group in zip(hows, groups, strict=True)],
        [how.dtype for how in hows],
        device,
        max(stated) if limit is None and stated and None not in stated else limit,
    )


def stack_for(slot: Slot) -> Stack:
    """The matrices of a parameter.

    Raises:
        ConfigError: it has none, as its group was edited since it was checked.
    """
    shape, group = slot.layout.shape, slot.group
    found = stack_of(shape, group)
    if found is None:
        raise ConfigError(
            f"cannot update {slot.name}: '{slot.schema.family}' trains matrices, and {shape} is "
            f"none with split: {group['split']} and flatten: {group['flatten']}; set these back, "
            "or put it into a group with another optimizer"
        )
    return found


def _works(bucket: Bucket, memory: Tensor) -> Iterator[MatrixWork]:
    device = bucket.key.device
    for batch in batches_of(bucket.slots, device, len(memory)):
        slots = [bucket.slots[n] for n in batch.members]
        stacks = [stack_for(slot) for slot in slots]
        group, first = slots[0].group, stacks[0]
        numel = sum(stack.numel for stack in stacks)
        elements = memory[: 4 * numel].view(torch.float32)
        parts = torch.split(elements, [stack.numel for stack in stacks])
        views = [part.view(slot.layout.shape) for part, slot in zip(parts, slots, strict=True)]
        before = [_before(slot, view) for slot, view in zip(slots, views, strict=True)]
        behind = [_behind(slot, device) for slot in slots]
        gradient = torch.empty(0, dtype=bucket.key.gradient, device=device)
        direction = DirectionBucket(bucket_key(before[0], gradient), before)
        step = Bucket(bucket_key(behind[0], views[0]), behind)
        direction.parameters, step.gradients = list(views), list(views)
        addresses = list(map(Tensor.data_ptr, views))
        direction.parameter_addresses, step.gradient_addresses = addresses, addresses
        yield MatrixWork(
            members=batch.members,
            direction=direction,
            step=step,
            counters=[slot.state["step"] for slot in behind],
            stack=elements.view(-1, first.rows, first.cols),
            together=batch.together,
            scratch=memory[aligned(4 * numel) :],
            how=how_of(group, device),
            factor=factor_of(first, group),
        )


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
