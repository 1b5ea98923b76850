"""What may change under an optimizer's feet between two steps, noticed in microseconds.

A kernel that trusted an old dtype or size would write outside of its buffers, so thousands of
tensors are compared at every step.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import compress
from operator import attrgetter, eq
from typing import Any

from torch import Tensor

Fact = Callable[[Tensor], object]


class Facts:
    """Dtypes, shapes, devices and layouts of parameters and gradients, as they were once.

    Attributes:
        strides: stands for the strides at the last `hold`: the same object as long as they are
            the same; None where that is not known.
    """

    _PARAMETER: tuple[Fact, ...] = (
        *map(attrgetter, ("shape", "dtype", "device", "__class__")),
        Tensor.is_neg,
    )
    _GRADIENT: tuple[Fact, ...] = (*_PARAMETER, attrgetter("layout"), Tensor._is_zerotensor)
    _LAZY = (Tensor.is_neg, Tensor._is_zerotensor)

    def __init__(self, parameters: list[Tensor], gradients: list[Tensor | None]) -> None:
        self._absent = [g is None for g in gradients]
        present = [g for g in gradients if g is not None]
        self._known = [(get, list(map(get, parameters))) for get in self._PARAMETER]
        self._known_gradients = [(get, list(map(get, present))) for get in self._GRADIENT]
        self.strides: Any = None

    def by_member(self) -> list[tuple[object, ...]]:
        """The facts of each parameter that has a gradient, and of this gradient."""
        has_one = [not absent for absent in self._absent]
        columns = [list(compress(known, has_one)) for _, known in self._known]
        columns += [known for _, known in self._known_gradients]
        return list(zip(*columns, strict=True))

    def lazy(self) -> list[int]:
        """Numbers of the parameters whose gradients are negated, or 0, only when they are read."""
        flags = [known for get, known in self._known_gradients if get in self._LAZY]
        if not any(map(any, flags)):
            return []
        members = [index for index, absent in enumerate(self._absent) if not absent]
        return [n for n, found in zip(members, zip(*flags, strict=True), strict=True) if any(found)]

    def hold(self, parameters: list[Tensor], gradients: list[Tensor | None]) -> bool:
        """Whether all facts are as they were."""
        if [g is None for g in gradients] != self._absent:
            return False
        present = [g for g in gradients if g is not None]
        if self.strides is not None and self.strides.check(*parameters, *present):
            return True
        if not self._compare(parameters, present):
            return False
        # Not before they held once: making a guard costs more than many comparisons.
        self.strides = _guard([*parameters, *present])
        return True

    def _compare(self, parameters: list[Tensor], present: list[Tensor]) -> bool:
        """Column by column, without keeping a new object."""
        return all(all(map(eq, map(get, parameters), known)) for get, known in self._known) and all(
            all(map(eq, map(get, present), known)) for get, known in self._known_gradients
        )


def _guard(tensors: list[Tensor]) -> Any:
    """Torch's own comparison of tensors with what they were, in C++; None where there is none.

    It compares strides, types and requires_grad as well: a refusal says nothing, consent all.
    """
    try:
        from torch._C._dynamo.guards import TensorGuards
    except ImportError:
        return None
    try:
        return TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
    except TypeError:  # another signature than that of torch 2.6 to 2.13
        return None
