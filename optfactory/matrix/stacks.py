"""Which matrices a parameter is made of, and what is done to them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from optfactory.matrix.coefficients import steps_of
from optfactory.matrix.orthogonalize import Orthogonalization, dtype_for


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


def neurons_of(shape: Sequence[int], group: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The shape of a number for each row of a parameter's matrices; None if none is kept.

    `split` does not change it: the rows of one block follow those of the other.
    """
    if not group["neuron_norm"] or stack_of(shape, group) is None:
        return None
    return tuple(shape[:1] if group["flatten"] else shape[:-1])


def extents(
    shape: Sequence[int], split: int, flatten: bool
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Where each matrix of a parameter begins in it, and its size, dimension by dimension.

    >>> extents((6, 5), 2, False)
    [((0, 0), (3, 5)), ((3, 0), (3, 5))]
    """
    lead = 0 if flatten else len(shape) - 2
    rows, behind = shape[lead] // split, tuple(shape[lead + 1 :])
    zeros = (0,) * len(behind)
    return [
        ((*place, number * rows, *zeros), (*(1,) * lead, rows, *behind))
        for place in itertools.product(*map(range, shape[:lead]))
        for number in range(split)
    ]


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
