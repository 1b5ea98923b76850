"""Positions between values, for codes rounded at random, against exact fractions."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch

from optfactory.rules.options import KernelOptions
from optfactory.state import quantmap
from optfactory.state.lines import from_pattern, pattern_of
from optfactory.state.positions import Positions, positions_of
from optfactory.state.random_codes import encode_at_random
from tests.reference import tables

EXACT = {"signed": tables.SIGNED_EXACT[127:], "unsigned": tables.UNSIGNED_EXACT}
MAPS = {"signed": quantmap.SIGNED, "unsigned": quantmap.UNSIGNED}
both_maps = pytest.mark.parametrize("which", EXACT)

# Of a code: with 128 codes in the last decade, it is 7e-7 of a number, as values are exact to.
CLOSE = Fraction(1, 10_000)


def of(which: str) -> tuple[Positions, int]:
    """The positions of a map, and that of 0."""
    lines = MAPS[which].lines
    assert lines is not None
    return positions_of(lines), 0 if which == "signed" else 1


@both_maps
def test_values_are_at_their_codes(which: str) -> None:
    positions, zero = of(which)
    exact = [float(np.float32(value)) for value in EXACT[which]]
    found = [positions.position(value) - zero for value in exact]
    assert max(abs(at - k) for k, at in enumerate(found)) < CLOSE
    assert found[0] == 0


@both_maps
def test_straight_lines_lie_between(which: str) -> None:
    positions, zero = of(which)
    for k, (low, high) in enumerate(itertools.pairwise(EXACT[which])):
        for part in (Fraction(1, 7), Fraction(1, 2), Fraction(9, 10)):
            size = Fraction(float(np.float32(float(low + part * (high - low)))))
            want = zero + k + (size - low) / (high - low)
            assert abs(positions.position(float(size)) - want) < CLOSE, (k, part)


@both_maps
def test_positions_grow(which: str) -> None:
    """Next to the ends of lines, but for last bits, and from 0 on."""
    positions, _ = of(which)
    for end in (*positions.split[:-1], positions.least, 0.0):
        first = max(pattern_of(end) - 200, 0)
        found = [positions.position(from_pattern(first + n)) for n in range(400)]
        assert all(a <= b + CLOSE for a, b in itertools.pairwise(found))


@both_maps
def test_the_scale_keeps_its_code(which: str) -> None:
    """Its quotient may be one unit off on either side."""
    positions, zero = of(which)
    top = len(EXACT[which]) - 1 + zero
    near = range(pattern_of(1.0) - 1, pattern_of(1.0) + 2)
    assert {positions.position(from_pattern(pattern)) for pattern in near} == {top}


@both_maps
@pytest.mark.parametrize("floors", [True, False], ids=["floors", "no-floor"])
def test_codes_are_floors_of_positions(which: str, floors: bool) -> None:
    """Of the portable codec; kernels are compared with it in tests/emulation and tests/numerics."""
    positions, zero = of(which)
    rng = np.random.default_rng(0)
    sizes = np.float32([0, 1, *10 ** rng.uniform(-9, 0, 2000)])
    words = rng.integers(0, 2**32, len(sizes))
    options = KernelOptions(random_codes=True, floors=floors)
    x, random = torch.from_numpy(sizes), torch.from_numpy(words)
    codes = encode_at_random(x, torch.ones(len(x)), MAPS[which], options, random)
    for size, word, code in zip(sizes.tolist(), words.tolist(), codes.tolist(), strict=True):
        want = int(positions.position(size) + Fraction(word >> 9, 1 << 23)) - zero
        if which == "signed":
            want += 127
        elif floors and size > 0:
            want = max(want, 1)
        assert code == want, size
