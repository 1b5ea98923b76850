"""Codes by arithmetic, as kernels for AMD's processors find most, against the exact rule."""

from __future__ import annotations

import numpy as np
import pytest

from optfactory.state import quantmap
from optfactory.state.quantmap import LINE_MARGIN, QuantizationMap
from tests.reference import quantization as q

CODECS = {"signed": q.SIGNED_CODEC, "unsigned": q.UNSIGNED_CODEC}
MAPS = {"signed": quantmap.SIGNED, "unsigned": quantmap.UNSIGNED}
both_maps = pytest.mark.parametrize("which", MAPS)


def by_lines(y: np.ndarray, qmap: QuantizationMap, floors: bool) -> tuple[np.ndarray, np.ndarray]:
    """What kernels/cpu/codec.h computes: distances from the code of zero, and which are certain."""
    numbers, splits, lines = qmap.line_tables(floors)
    size = np.maximum(np.abs(y), np.float32(2.0**-23))
    exponent = (size.view(np.uint32) >> 23) % 32
    line = np.array(numbers)[exponent] + (size >= np.array(splits, np.float32)[exponent])
    slope = np.array([item.slope for item in lines], np.float32)[line]
    offset = np.array([item.offset for item in lines], np.float32)[line]
    # The product of two floats is exact in float64: this is the fused operation's one rounding.
    at = (size.astype(np.float64) * slope + offset).astype(np.float32)
    whole = np.floor(at)
    last = np.array([item.last for item in lines])[line]
    return np.minimum(whole.astype(int), last), at - whole >= np.float32(2 * LINE_MARGIN)


def numbers_to_try(qmap: QuantizationMap) -> np.ndarray:
    """Neighbors of every boundary and of every power of two, and many others, of both signs."""
    spots = [abs(mid) for mid in qmap.midpoints] + [2.0**-e for e in range(30)]
    patterns = np.array(spots, np.float32).view(np.int32)
    near = (patterns[:, None] + np.arange(-600, 601)).astype(np.int32).reshape(-1).view(np.float32)
    rng = np.random.default_rng(0)
    wide = (10 ** rng.uniform(-9, 0, 200_000)).astype(np.float32)
    even = rng.uniform(0, 1, 200_000).astype(np.float32)
    y = np.concatenate([near, wide, even, np.float32([0.0, 1e-45, 1.0])])
    y = y[(y >= 0) & (y <= 1)]
    return np.concatenate([y, -y[y < 0.995]]) if qmap.signed else y


@both_maps
def test_zero_is_certain(which: str) -> None:
    distance, certain = by_lines(np.zeros(1, np.float32), MAPS[which], floors=which == "signed")
    assert distance == 0
    assert certain


@both_maps
def test_certain_codes_are_the_nearest(which: str) -> None:
    qmap, codec = MAPS[which], CODECS[which]
    y = numbers_to_try(qmap)
    distance, certain = by_lines(y, qmap, floors=False)
    codes = qmap.zero_code + np.where(y < 0, -distance, distance)
    expected = q.nearest_code(y, codec).astype(int)
    assert (codes[certain] == expected[certain]).all()
    assert certain[-400_000:].mean() > 0.999


def test_the_floor_lifts_what_is_not_zero() -> None:
    y = numbers_to_try(quantmap.UNSIGNED)
    distance, certain = by_lines(y, quantmap.UNSIGNED, floors=True)
    expected = np.maximum(q.nearest_code(y, q.UNSIGNED_CODEC).astype(int), 1)
    assert (distance[certain] == expected[certain]).all()


def test_the_symmetric_map_is_left_to_the_keys() -> None:
    y = numbers_to_try(quantmap.SIGNED)
    assert not by_lines(y, quantmap.SYMMETRIC, floors=False)[1].any()
