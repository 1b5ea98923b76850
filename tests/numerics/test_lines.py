"""The lines of the dynamic maps against exact numbers, and against bitsandbytes' tables."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest

from optfactory.state import quantmap
from optfactory.state.lines import Lines
from tests.reference import tables

MAPS = {
    "signed": (quantmap.SIGNED, tables.SIGNED_EXACT, tables.SIGNED),
    "unsigned": (quantmap.UNSIGNED, tables.UNSIGNED_EXACT, tables.UNSIGNED),
}
both_maps = pytest.mark.parametrize("which", MAPS)


def lines_of(which: str) -> Lines:
    lines = MAPS[which][0].lines
    assert lines is not None
    return lines


def farthest(numbers: tuple[float, ...], exact: list[Fraction]) -> float:
    """The greatest relative distance."""
    pairs = zip(numbers, exact, strict=True)
    return float(
        max(abs(Fraction(x) / want - 1) if want else abs(Fraction(x)) for x, want in pairs)
    )


@both_maps
def test_values_are_the_exact_ones_up_to_last_bits(which: str) -> None:
    qmap, exact, printed = MAPS[which]
    assert farthest(qmap.values, list(exact)) < 6.3e-7
    assert farthest(qmap.values, [Fraction(float(x)) for x in printed]) < 6.3e-7
    assert qmap.values[-1] == 1
    assert qmap.values[qmap.zero_code] == 0


@both_maps
def test_boundaries_are_the_exact_ones_up_to_last_bits(which: str) -> None:
    """With the 1.2e-7 of a product with a rounded reciprocal: within 3e-7."""
    qmap, exact, _ = MAPS[which]
    middles = [(a + b) / 2 for a, b in itertools.pairwise(exact)]
    assert farthest(qmap.firsts, middles) < 1.8e-7
    assert (np.diff(qmap.firsts) > 0).all()


@both_maps
def test_numbers_start_where_the_map_says(which: str) -> None:
    """Each float32 number next to a boundary, and many others."""
    qmap, lines = MAPS[which][0], lines_of(which)
    firsts = np.array([x for x in qmap.firsts if x > 0], np.float32)
    near = firsts.view(np.int32)[:, None] + np.arange(-40, 41, dtype=np.int32)
    rng = np.random.default_rng(0)
    spread = (10 ** rng.uniform(-9, 0, 20_000)).astype(np.float32)
    sizes = np.concatenate([near.reshape(-1).view(np.float32), spread, np.float32([0, 1e-45, 1])])
    sizes = sizes[sizes <= 1]
    least = 0 if lines.signed else 1
    want = np.searchsorted(firsts, sizes, side="right") + least
    assert [lines.number(float(x)) for x in sizes] == want.tolist()


@both_maps
def test_every_value_has_its_own_code(which: str) -> None:
    qmap = MAPS[which][0]
    assert [qmap.nearest_code(x) for x in qmap.values] == list(range(256))
