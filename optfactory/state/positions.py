"""Where numbers lie between the values of a map, for codes that are rounded at random.

The position of a number is k at the value of the k-th code (`optfactory.state.lines` counts them),
and goes by straight lines in between, so that

    k = floor(position + u),  u uniform in [0, 1),

keeps the number on the average. Values of a decade are equally far from each other, and three times
as far from the last one to the next decade's first. A line leads over both: it ends where the next
decade's values begin, and bends at its last value. With i the line of |y|, found as in `lines`,

    m = fma(step[i], |y|, start[i])
    m = min(m, fma(m, 1 / 3, bend[i]))
    position = (pattern of m - pattern of 1 / 2) * 2^(e - 23)

whose pattern stands for m itself between 1 and 2, and for 2 m - 1 between 1 / 2 and 1. The last
line is that from the last value below 1 to 1. Between 0 and the least value, where these lines do
not lead to 0, m is at most fma(first, |y|, 1 / 2) in the signed map, and is fma(first, |y|, 3 / 4)
in the unsigned one, below `least`. All is float32, each operation rounded once; u is a whole number
of 2^-23.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cache

from optfactory.state.lines import (
    Lines,
    float32,
    guess,
    octave,
    pattern_of,
)

THIRD = float32(Fraction(1, 3))
_HALF = 126 << 23
# What m must not exceed where a line does not bend: m / 3 + 4 / 3 is m at 2.
_STRAIGHT = Fraction(4, 3)


@dataclass(frozen=True)
class Positions:
    """The lines of positions, as kernels look them up; the names are explained above."""

    signed: bool
    split: tuple[float, ...]
    step: tuple[float, ...]
    start: tuple[float, ...]
    bend: tuple[float, ...]
    first: float
    least: float

    def tables(self) -> list[tuple[float, ...]]:
        """What kernels look up: splits, steps, starts and bends."""
        return [self.split, self.step, self.start, self.bend]

    def octaves(self) -> list[int]:
        """As `Lines.octaves`."""
        return [octave(field, self.split, self.signed) for field in range(128)]

    def position(self, size: float) -> Fraction:
        """The position of a magnitude up to 1, a float32 number."""
        line = guess(size)
        line += size >= self.split[line]
        m = _fma(self.step[line], size, self.start[line])
        m = min(m, _fma(m, THIRD, self.bend[line]))
        if self.signed:
            m = min(m, _fma(self.first, size, 0.5))
        elif size < self.least:
            m = _fma(self.first, size, 0.75)
        e = line if self.signed else line + 1
        return Fraction(pattern_of(m) - _HALF << e, 1 << 23)


def _fma(a: float, b: float, c: float) -> float:
    return float32(Fraction(a) * Fraction(b) + Fraction(c))


@cache
def positions_of(lines: Lines) -> Positions:
    """The positions of numbers among the values of a map by lines."""
    value = [Fraction(lines.value(k)) for k in range(257 if not lines.signed else 129)]
    power, lowest = (-6, 0) if lines.signed else (-7, 1)  # of the first decade
    decades = range(lowest, lowest + 7)
    ends = [(2 << e) for e in decades]
    ends[-1] -= 1  # the line of the last value below 1 begins there
    step = [Fraction(10, 9) / Fraction(10) ** (e + power) for e in decades]
    start = [Fraction(8, 9) - Fraction(1, 2 << e) for e in decades]
    bend = [Fraction(4, 3) - Fraction(2, 3 << e) for e in decades]
    bend[-1] = _STRAIGHT
    if lines.signed:  # the least value is in no decade
        step[0] = 1 / (value[2] - value[1])
        start[0], bend[0] = 1 - step[0] * value[1], _STRAIGHT
        first, least = 1 / (2 * value[1]), Fraction(0)
    else:
        first, least = 1 / (4 * value[2]), value[2]
    last = 1 / (2 * (1 - value[-2]) * (len(value) - 1))
    # The scale itself and its neighbours, which quotients may be, have the position of 1.
    step, start, bend = (
        [*step, last],
        [*start, 1 - last + Fraction(1, 2**25)],
        [*bend, Fraction(2, 3) - Fraction(1, 2**25)],
    )
    return Positions(
        lines.signed,
        (*(float(value[end]) for end in ends), float("inf")),
        tuple(map(float32, step)),
        tuple(map(float32, start)),
        tuple(map(float32, bend)),
        float32(first),
        float(least),
    )
