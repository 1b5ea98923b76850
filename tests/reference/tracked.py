"""Float64 numbers that carry a bound on the error of the same computation in float32.

A `Tracked` holds what the formula gives in float64 and, beside it, a running first-order
bound on how far float32 arithmetic (any order of the operations, fused or not) may stray.
The references so state their own tolerance, also where terms of opposite sign cancel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Union

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

UNIT = 2.0**-24  # relative error of one rounding to nearest in float32
TINY = 2.0**-150  # absolute error of one rounding of a subnormal result
FLOAT32_OVERFLOW = 2.0**128 * (1 - 2.0**-25)  # rounds to infinity from here on

# Bits of the significand and exponent of the smallest subnormal.
_FORMATS = {"float32": (24, -149), "float16": (11, -24), "bfloat16": (8, -133)}

Operand = Union["Tracked", float]


def _rounding(value: Array) -> Array:
    return np.where(value == 0, 0.0, np.abs(value) * UNIT + TINY)


@dataclass(frozen=True)
class Tracked:
    """A float64 array and the bound on its float32 counterpart's error, element by element.

    A value that is not finite has no error: float32 must have the same.
    """

    value: Array
    error: Array

    def __post_init__(self) -> None:
        object.__setattr__(self, "error", np.where(np.isfinite(self.value), self.error, 0.0))

    @staticmethod
    def exact(value: ArrayLike | Tracked) -> Tracked:
        """Numbers that float32 holds exactly: parameters, gradients, stored states."""
        if isinstance(value, Tracked):
            return value
        array = np.asarray(value, dtype=np.float64)
        return Tracked(array, np.zeros_like(array))

    @staticmethod
    def of(operand: Operand) -> Tracked:
        """A host scalar costs one rounding when it is passed as float32."""
        if isinstance(operand, Tracked):
            return operand
        value = np.asarray(float(operand))
        held = float(np.float32(operand)) == float(operand)
        return Tracked(value, np.zeros_like(value) if held else _rounding(value))

    @staticmethod
    def choose(mask: NDArray[np.bool_], one: Operand, other: Operand) -> Tracked:
        """`one` where the mask is true, else `other`."""
        one, other = Tracked.of(one), Tracked.of(other)
        value = np.where(mask, one.value, other.value)
        return Tracked(value, np.where(mask, one.error, other.error))

    def _rounded(self) -> Tracked:
        return Tracked(self.value, self.error + _rounding(self.value))

    def __add__(self, other: Operand) -> Tracked:
        other = Tracked.of(other)
        value = self.value + other.value
        if not other.value.any() and not other.error.any():
            return Tracked(value, self.error + 0 * other.error)
        return Tracked(value, self.error + other.error)._rounded()

    def __neg__(self) -> Tracked:
        return Tracked(-self.value, self.error)

    def __sub__(self, other: Operand) -> Tracked:
        return self + (-Tracked.of(other))

    def __mul__(self, other: Operand) -> Tracked:
        other = Tracked.of(other)
        # The second-order term is all there is where both factors cancelled to zero.
        error = np.abs(self.value) * other.error + np.abs(other.value) * self.error
        error = error + self.error * other.error
        return Tracked(self.value * other.value, error)._rounded()

    def __truediv__(self, other: Operand) -> Tracked:
        other = Tracked.of(other)
        value = self.value / other.value
        error = (self.error + np.abs(value) * other.error) / np.abs(other.value)
        return Tracked(value, error)._rounded()

    def __radd__(self, other: float) -> Tracked:
        return self + other

    def __rmul__(self, other: float) -> Tracked:
        return self * other

    def __rsub__(self, other: float) -> Tracked:
        return Tracked.of(other) - self

    def sqrt(self) -> Tracked:
        """Square root; near zero the bound is that of the interval, not of the derivative."""
        root = np.sqrt(self.value)
        below = np.sqrt(np.maximum(self.value - self.error, 0))
        above = np.sqrt(self.value + self.error)
        return Tracked(root, np.maximum(above - root, root - below))._rounded()

    def maximum(self, other: Tracked) -> Tracked:
        """Element-wise maximum that keeps NaN, as torch does."""
        return Tracked(np.maximum(self.value, other.value), np.maximum(self.error, other.error))

    def sign(self) -> Tracked:
        """-1, 0 or 1; where rounding errors may decide it, an error that allows for all three."""
        unsure = np.abs(self.value) < 4 * self.error
        return Tracked(np.sign(self.value), np.where(unsure, 2.0, 0.0))

    def norm(self) -> Tracked:
        """Euclidean norm of the whole tensor, 8 roundings granted to its summation."""
        total = np.sqrt(np.sum(self.value * self.value))
        if total == 0:
            return Tracked(total, np.zeros_like(total))
        error = np.sum(np.abs(self.value) * self.error) / total + 8 * UNIT * total
        return Tracked(total, error)

    def saturated(self) -> Tracked:
        """Infinity where float32 overflows."""
        beyond = np.abs(self.value) >= FLOAT32_OVERFLOW
        value = np.where(beyond, np.sign(self.value) * np.inf, self.value)
        return Tracked(value, self.error)


def spacing(value: Array, dtype: Any) -> Array:
    """Distance between neighbouring numbers around value: float32, float16 or 'bfloat16'."""
    precision, lowest = _FORMATS[str(dtype).removeprefix("torch.")]
    known = np.where(np.isfinite(value), value, 0.0)
    _, exponent = np.frexp(known)
    return np.ldexp(1.0, np.where(known == 0, lowest, np.maximum(exponent - precision, lowest)))
