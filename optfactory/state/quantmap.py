"""Quantization maps: how 8-bit optimizer state represents numbers in [-1, 1].

A map lists the 256 values that the codes 0 to 255 stand for, in ascending order. The "dynamic"
maps (Dettmers et al. 2022, arXiv:2110.02861) cut each decade into equal cells, so that values and
codes follow by arithmetic: `lines` defines both. `compat: bitsandbytes` and symmetric maps go by
tables, bit-identical to bitsandbytes' and torchao's. A code means the same in both, but for last
bits.

A block of values x shares one float32 scale, and the code of x is that of y = x / scale.

- Lines: y is x times the rounded reciprocal of the scale, and `Lines.number` gives the code, which
  is that of the nearest value but for quotients within 3e-7 (relative) of a boundary.
- Tables: y is rounded once (IEEE division); the code is that of the nearest value, the boundary
  between neighbours is their float32 mid-point, and a value on a boundary takes the even code.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property

from optfactory.state import tables
from optfactory.state.lines import (
    SIGNED_LINES,
    UNSIGNED_LINES,
    Lines,
    float32,
    from_pattern,
    pattern_of,
)

# The upper 16 bits of the float32 patterns of 2^-23 and of 1. No boundary of a usable map lies
# below 2^-23, so smaller numbers share the first key.
_LOWEST_KEY = 104 << 7
_HIGHEST_KEY = 127 << 7


def _next_float32(value: float) -> float:
    if value < 0:
        return -from_pattern(pattern_of(-value) - 1)
    return from_pattern(pattern_of(value) + 1)


@dataclass(frozen=True)
class QuantizationMap:
    """An ascending table of 256 float32 values; its index is the code.

    Attributes:
        name: maps of one name have the same codes, whose values may differ in last bits.
        values: the 256 values, exactly representable in float32.
        lines: what defines the values and the codes; None if a table does.
    """

    name: str
    values: tuple[float, ...]
    lines: Lines | None = None

    @property
    def random_bits(self) -> int:
        """The random bits that rounding at random takes."""
        return 32

    @property
    def signed(self) -> bool:
        """Whether the map has negative values."""
        return self.values[0] < 0

    @property
    def zero_code(self) -> int:
        """The code of 0."""
        return self.values.index(0.0)

    @property
    def one_code(self) -> int:
        """The code of 1, which decodes to the scale."""
        return self.values.index(1.0)

    @cached_property
    def firsts(self) -> tuple[float, ...]:
        """The least float32 number of each code from 1 on, in ascending order."""
        if self.lines is None:
            return tuple(self._first_in_table(code) for code in range(1, 256))
        if not self.lines.signed:
            return tuple(self.lines.first(k) for k in range(2, 257))
        positive = [self.lines.first(k) for k in range(1, 129)]
        return (*(_next_float32(-first) for first in reversed(positive[:127])), *positive)

    def _first_in_table(self, code: int) -> float:
        boundary = float32(float32(self.values[code - 1] + self.values[code]) * 0.5)
        return _next_float32(boundary) if code % 2 else boundary

    def nearest_code(self, y: float) -> int:
        """The code of a float32 number in [-1, 1]."""
        return bisect_right(self.firsts, y)

    @cached_property
    def keys(self) -> tuple[int, ...]:
        """The look-up table with which kernels find the nearest code without a search.

        The upper 16 bits of the float32 pattern of |y| (clamped to [2^-23, 1]) form a key; the
        entries for y >= 0 come first, those for y < 0 behind them. No interval of numbers with the
        same key holds more than one decision boundary, so that an entry can pack the code at the
        interval's lower end (upper 16 bits) with how far below the next code that end lies: adding
        the pattern's lower 16 bits carries into the code exactly behind the boundary. For negative
        y the lower bits are inverted, so that they too ascend with y.

        Raises:
            ValueError: two boundaries share an interval, i.e. the map is too fine for this table.
        """
        keys = range(_LOWEST_KEY, _HIGHEST_KEY + 1)
        return tuple(self._key_entry(key << 16, sign) for sign in (1, -1) for key in keys)

    def all_keys(self, floors: bool) -> list[int]:
        """`keys` for all upper halves of float32 patterns, as CPUs look them up without clamping.

        Entry 32768 + (pattern >> 16) belongs to a pattern that is seen as a signed number: those
        of negative numbers come first. Magnitudes outside of [2^-23, 1] take the code of its ends.

        Args:
            floors: in an unsigned map, magnitudes below the smallest value take its code.
        """
        half = len(self.keys) // 2
        positive, negative = list(self.keys[:half]), list(self.keys[half:])
        if not self.signed:
            if floors:
                (smallest,) = struct.unpack("<I", struct.pack("<f", self.values[1]))
                below = (smallest >> 16) - _LOWEST_KEY
                positive[:below] = [1 << 16] * below
            negative = positive
        above = 0x7FFF - _HIGHEST_KEY
        rows = []
        for entries, inverted in ((negative, 0xFFFF if self.signed else 0), (positive, 0)):
            codes = [(entry + inverted) >> 16 for entry in (entries[0], entries[-1])]
            least, most = (code << 16 for code in codes)
            rows += [*[least] * _LOWEST_KEY, *entries, *[most] * above]
        return rows

    def _key_entry(self, first_pattern: int, sign: int) -> int:
        def code_at(low: int) -> int:
            pattern = first_pattern + (low if sign > 0 else 0xFFFF - low)
            return self.nearest_code(sign * struct.unpack("<f", struct.pack("<I", pattern))[0])

        first, last = code_at(0), code_at(0xFFFF)
        if last - first > 1:
            raise ValueError(f"map '{self.name}' is too fine: codes {first}..{last} share a key")
        if last == first:
            return first << 16
        low, high = 0, 0xFFFF
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if code_at(middle) == first else (low, middle)
        return (first << 16) | (0xFFFF - low)


SIGNED = QuantizationMap(
    "dynamic_signed",
    tuple(-SIGNED_LINES.value(127 - code) for code in range(127))
    + tuple(SIGNED_LINES.value(k) for k in range(129)),
    SIGNED_LINES,
)
UNSIGNED = QuantizationMap(
    "dynamic_unsigned", tuple(UNSIGNED_LINES.value(k) for k in range(1, 257)), UNSIGNED_LINES
)

SIGNED_TABLE = QuantizationMap(
    "dynamic_signed",
    tuple(map(float32, (*(-v for v in reversed(tables.POSITIVE[1:-1])), *tables.POSITIVE))),
)
UNSIGNED_TABLE = QuantizationMap("dynamic_unsigned", tuple(map(float32, tables.UNSIGNED)))

# bitsandbytes' map with -1 in the place of the negative value nearest to 0: the other negative
# values move up by one, so that 0 keeps its code.
SYMMETRIC = QuantizationMap(
    "dynamic_symmetric",
    (-1.0, *SIGNED_TABLE.values[: SIGNED_TABLE.zero_code - 1], *SIGNED_TABLE.values[127:]),
)

_SIGNED_MAPS = {"lines": SIGNED, "table": SIGNED_TABLE, "symmetric": SYMMETRIC}


def map_for(signed: bool, kind: str = "lines") -> QuantizationMap:
    """The map of a state: signed for first moments, unsigned for second moments.

    Args:
        kind: ``lines``, ``table`` (bitsandbytes' values) or ``symmetric``; see
            `KernelOptions.map_kind`.
    """
    if signed:
        return _SIGNED_MAPS[kind]
    return UNSIGNED_TABLE if kind == "table" else UNSIGNED
