"""How a parameter is stored: to nearest, stochastically, compensated, decayed once stored.

All functions take and give float64 arrays whose values the named dtype holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.reference.base import Options, Update
from tests.reference.tracked import spacing

Array = NDArray[np.float64]
Words = NDArray[np.uint32]

_LARGEST = {
    "float32": (2 - 2.0**-23) * 2.0**127,
    "float16": 65504.0,
    "bfloat16": (2 - 2.0**-7) * 2.0**127,
}
_SMALLEST_NORMAL_HALF = 2.0**-14


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _overflowed(magnitude: Array, x: Array, name: str) -> Array:
    """The sign of x, infinity beyond the dtype's largest number, and x itself if not finite."""
    magnitude = np.where(magnitude > _LARGEST[name], np.inf, magnitude)
    return np.where(np.isfinite(x), np.copysign(magnitude, x), x)


def nearest(x: Array, dtype: Any) -> Array:
    """Rounded to nearest, ties to even."""
    name, known = _name(dtype), np.where(np.isfinite(x), x, 0.0)
    unit = spacing(known, name)
    return _overflowed(np.rint(np.abs(known) / unit) * unit, x, name)


def away(x: Array, dtype: Any) -> Array:
    """Rounded to nearest, ties away from zero."""
    name, known = _name(dtype), np.where(np.isfinite(x), x, 0.0)
    unit = spacing(known, name)
    return _overflowed(np.floor(np.abs(known) / unit + 0.5) * unit, x, name)


def stochastic(x: Array, random: Words, dtype: Any) -> Array:
    """A float32 value's neighbours in a 16-bit dtype, the upper one with the cut part's odds.

    bfloat16 cuts 16 bits and compares them with 16 random ones, float16 13 with 13; multiples of
    float16's smallest number, below 2^-14, take 16 again.
    """
    name, known = _name(dtype), np.where(np.isfinite(x), x, 0.0)
    unit = spacing(known, name)
    coarse = np.abs(known) >= _SMALLEST_NORMAL_HALF
    kept_bits = np.where(coarse & (name == "float16"), 13, 16)
    part = (random & np.uint32(0xFFFF)).astype(np.int64) & ((1 << kept_bits) - 1)
    whole = np.floor(np.abs(known) / unit + part / 2.0**kept_bits)
    return _overflowed(whole * unit, x, name)


def mix(x: Words) -> Words:
    """A bijection of 32-bit words that looks random (Ellis' and Wellons' 'lowbias32')."""
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(0x7FEB352D)
    x = x ^ (x >> np.uint32(15))
    x = x * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def random_words(seed: int, number: int, step: int, count: int, state: int | None = None) -> Words:
    """The random bits of elements 0 to count - 1 of a parameter at a step, or of a state of it.

    All states draw one word, turned to the left by 0, 16, 8, 24, 4, ... bits.
    """
    key = np.zeros(1, dtype=np.uint32)
    with np.errstate(over="ignore"):
        for part in (seed, number, step):
            key = mix(key ^ np.uint32(part))
        if state is not None:
            key = mix(key + np.uint32(0x9E3779B9))
        element = np.arange(count, dtype=np.uint64)
        high = mix((element >> np.uint64(32)).astype(np.uint32) ^ key)
        words = mix(high ^ element.astype(np.uint32))
    by = np.uint32(int(f"{state or 0:05b}"[::-1], 2))
    return words << by | words >> (np.uint32(32) - by) if by else words


def compensated(p: Array, compensation: Array) -> Array:
    """What the rule sees of a parameter whose rounding error is kept beside it."""
    with np.errstate(invalid="ignore"):
        return nearest(p + compensation, "float32")


def joined(p: Array, low: Array) -> Array:
    """The float32 master of which bfloat16 p is one half and integers the other."""
    upper = p.astype(np.float32).view(np.uint32).astype(np.int64)
    return (upper + low.astype(np.int64)).astype(np.uint32).view(np.float32).astype(np.float64)


def own_master(p: Array, master: Array, dtype: Any) -> Array:
    """A parameter's float32 master; where it is that of another, the parameter itself."""
    rounded = nearest(master, dtype)
    own = (rounded == p) & (np.signbit(rounded) == np.signbit(p))
    return np.where(own, master, p)


@dataclass(frozen=True)
class Stored:
    """What may be stored for an update, given its float32 error bounds: bounds themselves.

    Every way of storing is monotonic, so that the bounds of a value give those of what is stored;
    nearly always these are one number.
    """

    below: Array
    above: Array
    dtype: Any
    rounding: str
    late_decay: Array | None
    random: Words | None

    @staticmethod
    def of(update: Update, dtype: Any, o: Options, slack: float, number: int) -> Stored:
        """For the parameter of this number in its optimizer."""
        value, error = update.p.value, slack * update.p.error
        rounding = "nearest" if _name(dtype) == "float32" else o.storing
        random = None
        if rounding == "stochastic":
            random = random_words(o.seed, number, update.step, value.size).reshape(value.shape)
        return Stored(
            nearest(value - error, "float32"), nearest(value + error, "float32"), dtype, rounding,
            update.late_decay, random,
        )  # fmt: skip

    def parameter(self) -> tuple[Array, Array]:
        """Least and greatest parameter."""
        low, high = (self._store(x) for x in (self.below, self.above))
        return low, high

    def _store(self, x: Array) -> Array:
        if self.random is not None:
            return stochastic(x, self.random, self.dtype)
        if self.rounding == "split":
            return away(x, self.dtype)
        p = nearest(x, self.dtype)
        if self.late_decay is None:
            return p
        factor = nearest(self.late_decay, "float32")
        return nearest(nearest(p * factor, "float32"), self.dtype)

    def accepts_master(self, master: Array, p: Array) -> bool:
        """Whether it is the update, and p rounded from it."""
        inside = (self.below <= master) & (master <= self.above) & (self._store(master) == p)
        return bool((inside | (np.isnan(self.below) & np.isnan(master) & np.isnan(p))).all())

    def compensation(self, p: Array) -> tuple[Array, Array]:
        """Least and greatest rest that is kept beside the parameter p; 0 if p is not finite."""
        rests = []
        for x in (self.below, self.above):
            with np.errstate(invalid="ignore"):
                rest = np.where(np.isfinite(p), nearest(x - p, "float32"), 0.0)
            rests.append(nearest(rest, self.dtype))
        return rests[0], rests[1]
