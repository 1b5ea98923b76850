"""Which matrices a parameter is made of, and how they share scratch memory."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from optfactory.matrix.coefficients import steps_of
from optfactory.matrix.orthogonalize import Orthogonalization, dtype_for
from optfactory.matrix.scratch import aligned, scratch_bytes

_FLOAT = 4  # bytes


@dataclass(frozen=True)
class Stack:
    """The matrices of one parameter, one behind the other: [count, rows, cols]."""

    count: int
    rows: int
    cols: int

    @property
    def numel(self) -> int:
        """The number of all elements."""
        return self.count * self.rows * self.cols


def stack_of(shape: Sequence[int], group: Mapping[str, Any]) -> Stack | None:
    """The matrices of a parameter of this shape; None if it is made of none.

    Two dimensions are a matrix, [E, M, N] are E of them; `flatten` takes all dimensions behind the
    first for one, and `split` cuts the rows into as many matrices.
    """
    if len(shape) < 2 or 0 in shape:
        return None
    if group["flatten"] and len(shape) > 2:
        shape = (shape[0], math.prod(shape[1:]))
    if len(shape) > 3 or shape[-2] % group["split"]:
        return None
    count = group["split"] * math.prod(shape[:-2])
    return Stack(count, shape[-2] // group["split"], shape[-1])


def how_of(group: Mapping[str, Any], device: torch.device) -> Orthogonalization:
    """How matrices of a param group are made orthogonal."""
    steps = steps_of(group["ns_coefficients"], group["ns_steps"])
    return Orthogonalization(steps, group["eps"], dtype_for(group["ns_dtype"], device))


def factor_of(stack: Stack, group: Mapping[str, Any]) -> float:
    """By what a direction is multiplied, so that steps of all shapes go equally far.

    `original` (Jordan): sqrt(max(1, rows / cols)). `match_rms_adamw` (Liu et al. 2025,
    arXiv:2502.16982, Eq. 4): 0.2 sqrt(max(rows, cols)), whose elements are as large as AdamW's.
    """
    if group["adjust_lr"] == "original":
        return math.sqrt(max(1.0, stack.rows / stack.cols))
    return 0.2 * math.sqrt(max(stack.rows, stack.cols))


@dataclass(frozen=True)
class StackBatch:
    """Parameters whose matrices are in scratch memory at the same time.

    Attributes:
        members: their numbers.
        together: how many matrices are multiplied at once.
        nbytes: of the matrices, and of what products need.
    """

    members: tuple[int, ...]
    together: int
    nbytes: int


def pack(
    stacks: Sequence[Stack],
    alike: Sequence[Hashable],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
    limit: int | None,
) -> list[StackBatch]:
    """Batches of parameters with matrices of one shape, within a limit of bytes.

    Args:
        stacks: the matrices of each parameter.
        alike: what parameters of one batch share beside the shape.
        dtypes: of the operands of each parameter's products.
        limit: bytes; one parameter is always taken. None is what the largest one needs.
    """

    def needs(members: Sequence[int], together: int) -> int:
        first = stacks[members[0]]
        shape = (first.rows, first.cols)
        whole = _FLOAT * sum(stacks[n].numel for n in members)
        return aligned(whole) + scratch_bytes(together, shape, dtypes[members[0]], device)

    if limit is None:
        limit = max((needs([n], 1) for n in range(len(stacks))), default=0)
    kinds: dict[Hashable, list[int]] = {}
    for number, (stack, key) in enumerate(zip(stacks, alike, strict=True)):
        kinds.setdefault((stack.rows, stack.cols, key), []).append(number)
    batches = []
    for members in kinds.values():
        while members:
            size = 1
            while size < len(members) and needs(members[: size + 1], 1) <= limit:
                size += 1
            taken, members = members[:size], members[size:]
            total, together = sum(stacks[n].count for n in taken), 1
            while together < total and needs(taken, together + 1) <= limit:
                together += 1
            batches.append(StackBatch(tuple(taken), together, needs(taken, together)))
    return batches
