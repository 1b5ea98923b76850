"""The oracles of the options: against torch's conversions, closed forms and printed examples."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.numerics.harness import DTYPES, SLACK
from tests.reference import lamb
from tests.reference import quantization as q
from tests.reference.base import Options, State, Update
from tests.reference.clipping import clip
from tests.reference.rounding import Stored, compensated, mix, nearest, random_words, stochastic
from tests.reference.tables import SIGNED, SYMMETRIC
from tests.reference.tracked import Tracked, spacing


def _spread(count: int, seed: int = 0) -> np.ndarray:
    """float32 numbers over the whole range, subnormal ones, ties and limits of 16-bit numbers."""
    rng = np.random.default_rng(seed)
    x = 10.0 ** rng.uniform(-44, 38.5, count) * rng.choice([-1, 1], count)
    near_half = 10.0 ** rng.uniform(-9, 5, count) * rng.choice([-1, 1], count)
    special = [0.0, -0.0, 65504.0, 65519.9, 65520.0, 3.4e38, np.inf, -np.inf, np.nan, 2.0**-14]
    with np.errstate(over="ignore"):
        return np.concatenate([x, near_half, special]).astype(np.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nearest_is_torch_conversion(dtype: str) -> None:
    x = _spread(200_000)
    target = DTYPES[dtype]
    ties = torch.from_numpy(x).to(target)
    between = ((ties.double() + torch.nextafter(ties, ties * 2).double()) / 2).float().numpy()
    for values in (x, between):
        want = torch.from_numpy(values).to(target).double().numpy()
        np.testing.assert_array_equal(nearest(values.astype(np.float64), target), want)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_stochastic_rounding_takes_a_neighbour_with_the_right_odds(dtype: str) -> None:
    target = DTYPES[dtype]
    x = _spread(100)
    x = x[np.isfinite(x) & (np.abs(x) < 6e4)].astype(np.float64)
    words = np.arange(2**16, dtype=np.uint32)
    for value in x:
        got = stochastic(np.full(words.shape, value), words, target)
        exact = nearest(np.array(value), target) == value
        assert np.unique(got).size <= (1 if exact else 2)
        assert abs(got.mean() - value) <= spacing(np.array(value), target) * 2.0**-16
        assert (torch.from_numpy(got).to(target).double().numpy() == got).all()


def test_the_hash_is_a_bijection_that_mixes() -> None:
    """Values of the published function, and about half of the bits change with one of the input."""
    words = random_words(7, 3, 11, 200_000)
    assert np.unique(words).size == words.size
    ones = np.unpackbits(words.view(np.uint8)).mean()
    assert ones == pytest.approx(0.5, abs=2e-3)
    for other in (random_words(8, 3, 11, 200_000), random_words(7, 4, 11, 200_000)):
        changed = np.unpackbits((words ^ other).view(np.uint8)).mean()
        assert changed == pytest.approx(0.5, abs=2e-3)
    x = 12345
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    assert int(mix(np.array([12345], dtype=np.uint32))[0]) == x ^ (x >> 16)


def test_the_printed_example_of_percentile_clipping() -> None:
    history, scales = np.zeros(100), []
    for step, squared in enumerate((1.0, 4.0, 0.25, 9.0), 1):
        history, scale = clip(np.sqrt(np.array([squared])), history, step, 5)
        scales.append(float(scale.value))
    np.testing.assert_allclose(scales, [1, 0.5, 1, 1 / 3], rtol=1e-12)
    assert history[:6].tolist() == [1, 1, 4, 0.25, 9, 1]


def test_the_symmetric_map() -> None:
    assert (np.diff(SYMMETRIC) > 0).all()
    assert SYMMETRIC[0] == -1
    assert SYMMETRIC[127] == 0
    assert (SYMMETRIC[127:] == SIGNED[127:]).all()
    assert (SYMMETRIC[1:127] == SIGNED[:126]).all()
    assert np.float32(-5.50000038e-07) not in SYMMETRIC


def test_the_sign_fix_does_three_things() -> None:
    rule = q.COMPAT_SIGNED_CODEC
    x = np.array([1.0, 1e-9, -1e-9, -0.0, 0.0, -0.5, -1.0])
    codes, scales = q.encode(x, rule)
    assert scales.tolist() == [1.0]
    assert codes[[1, 2, 3, 4, 6]].tolist() == [127, 126, 126, 127, 0]
    assert rule.values[codes[5]] == pytest.approx(-0.5, abs=1e-2)
    zeros, _ = q.encode(np.array([0.0, -0.0]), rule)
    assert zeros.tolist() == [255, 0]


def test_compensation_keeps_what_rounding_lost() -> None:
    p = np.array([1.0, -3.0, 100.0])
    lost = np.array([1e-3, 1e-4, 0.2])
    value = Tracked.exact(np.float32(p + lost).astype(np.float64))
    update = Update(value, {}, 1)
    stored = Stored.of(update, "bfloat16", Options(param_rounding="kahan"), SLACK, 0)
    (low, high), (rest, _) = stored.parameter(), stored.compensation(stored.parameter()[0])
    assert (low == high).all()
    np.testing.assert_allclose(compensated(low, rest), value.value, rtol=1e-5)
    assert (low != value.value).all()


def test_bounds_of_the_ratio_in_closed_form() -> None:
    """eps = 0 and t = 1: u = sign(g), so that the ratio is |p| / sqrt(n)."""
    p, g, zero = np.full(4, 3.0), np.array([1.0, -1, 2, -2]), np.zeros(4)
    start = State.zeros((4,))
    for bounds, want in (((0.0, 2.0), 2.0), ((5.0, 9.0), 5.0), ((0.0, 9.0), 3.0), (None, 3.0)):
        o = Options(eps=0.0, trust_ratio_bounds=bounds)
        assert lamb.step(p, g, start, o).ratio == pytest.approx(want)
        assert lamb.step(zero, g, start, o).ratio == 1
    assert lamb.step(p, g, start, Options(eps=0.0, always_adapt=False)).ratio == 1
    frozen = Options(eps=0.0, trust_ratio="clip", compat="bitsandbytes")
    assert (lamb.step(zero, g, start, frozen).p.value == 0).all()
