"""The package's quantizer against the printed tables and the exact rule, and against its peers."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch

from optfactory import build_optimizer
from optfactory.state import codec, quantmap
from tests.devices import here, host
from tests.reference import quantization as q
from tests.reference.tables import SIGNED, UNSIGNED

MAPS = {
    "signed": (quantmap.SIGNED, q.SIGNED_CODEC),
    "unsigned": (quantmap.UNSIGNED, q.UNSIGNED_CODEC),
    "signed table": (quantmap.SIGNED_TABLE, q.Codec(SIGNED, zero_code=127, floor=False)),
    "unsigned table": (quantmap.UNSIGNED_TABLE, q.Codec(UNSIGNED, zero_code=0, floor=True)),
}
LINES, TABLES = ["signed", "unsigned"], ["signed table", "unsigned table"]
all_maps = pytest.mark.parametrize("which", MAPS)


def _quantize(x: np.ndarray, which: str, block_size: int = 256) -> tuple[np.ndarray, np.ndarray]:
    codes, scales = codec.quantize_blockwise(torch.from_numpy(x), MAPS[which][0], block_size)
    return codes.numpy(), scales.numpy()


def _codes_of(y: np.ndarray, which: str) -> np.ndarray:
    """Codes of values in [-0.99296874, 1], each block led by a 1 that makes its scale 1."""
    rows = np.ones((y.size, 2), dtype=np.float32)
    rows[:, 1] = y
    codes, scales = _quantize(rows, which)
    assert (scales == 1).all()
    return codes[:, 1]


@all_maps
def test_values_are_the_specified_bytes(which: str) -> None:
    ours, rule = MAPS[which]
    values = np.array(ours.values, dtype=np.float32)
    assert values.astype(np.float64).tolist() == list(ours.values)
    assert values.tobytes() == rule.values.tobytes()
    assert ours.zero_code == rule.zero_code


@all_maps
def test_a_stored_block_is_stored_again_unchanged(which: str) -> None:
    ours, rule = MAPS[which]
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, size=(200, 256), dtype=np.uint8)
    codes[:, 0] = 255  # an element at the block's scale, as every stored block has one
    codes[0] = np.concatenate([[255], np.arange(255)])
    scales = (10 ** rng.uniform(-12, 6, size=(200, 1))).astype(np.float32)
    decoded = codec.dequantize_blockwise(
        torch.from_numpy(codes), torch.from_numpy(scales), ours
    ).numpy()
    assert decoded.tobytes() == q.decode32(codes, scales, rule).tobytes()
    again, same_scales = _quantize(decoded, which)
    assert (again == codes).all()
    assert np.abs(same_scales / scales - 1).max() <= 2.0**-23


def test_a_negative_extreme_is_stored_exactly() -> None:
    """The signed scale is max(max x, -min x / 0.99296874): -1 decodes to -1, not to -0.993."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((50, 256)).astype(np.float32)
    x[:, 7] = -8 * np.abs(rng.standard_normal(50)).astype(np.float32) - 4
    codes, scales = _quantize(x, "signed")
    assert (codes[:, 7] == 0).all()
    decoded = q.decode32(codes, scales, q.SIGNED_CODEC)
    np.testing.assert_allclose(decoded[:, 7], x[:, 7], rtol=2e-7)
    for _ in range(10):
        codes_again, scales_again = _quantize(q.decode32(codes, scales, q.SIGNED_CODEC), "signed")
        assert (codes_again == codes).all()
        np.testing.assert_allclose(scales_again, scales, rtol=3e-7)


@pytest.mark.parametrize("which", TABLES)
def test_midpoints_and_their_neighbours(which: str) -> None:
    rule = MAPS[which][1]
    mid = rule.midpoints
    below, above = np.nextafter(mid, np.float32(-2)), np.nextafter(mid, np.float32(2))
    k = np.arange(255)
    lowest = 1 if rule.floor else 0  # a positive value never takes the unsigned code of 0
    assert (_codes_of(below, which) == k.clip(min=lowest)).all()
    assert (_codes_of(above, which) == k + 1).all()
    assert (_codes_of(mid, which) == (k + k % 2).clip(min=lowest)).all()
    assert (_codes_of(rule.values, which) == np.arange(256)).all()


@all_maps
@pytest.mark.parametrize("spread", ["uniform", "log-uniform"])
def test_a_million_values_are_coded_exactly(which: str, spread: str) -> None:
    rng = np.random.default_rng(0)
    size = 1_000_000
    if spread == "uniform":
        x = rng.uniform(-1, 1, size)
    else:
        x = 10 ** rng.uniform(-9, 0, size) * rng.choice([-1, 1], size)
    x = x.astype(np.float32) if MAPS[which][0].signed else np.abs(x).astype(np.float32)
    q.assert_encodes(*_quantize(x, which), x, MAPS[which][1])


@all_maps
@pytest.mark.parametrize("block_size", [64, 256, 1024])
@pytest.mark.parametrize(
    "shape",
    [(), (1,), (255,), (257,), (1000,), (7, 300), (3, 64), (5, 4, 3, 70), (0,), (0, 4), (4, 0)],
)
def test_grid_of_rows(which: str, shape: tuple[int, ...], block_size: int) -> None:
    ours, rule = MAPS[which]
    rng = np.random.default_rng(0)
    x = np.asarray(rng.standard_normal(shape), dtype=np.float32)
    x = x if ours.signed else np.asarray(np.abs(x))
    codes, scales = _quantize(x, which, block_size)
    assert codes.dtype == np.uint8
    assert codes.shape == x.shape
    assert scales.shape == q.scales_shape(shape, block_size) or x.size == 0
    q.assert_encodes(codes, scales, x, rule, block_size)
    decoded = codec.dequantize_blockwise(
        torch.from_numpy(codes), torch.from_numpy(scales), ours, block_size
    )
    assert decoded.numpy().tobytes() == q.decode32(codes, scales, rule, block_size).tobytes()


@all_maps
def test_zero_blocks_and_signs_of_zero(which: str) -> None:
    rule = MAPS[which][1]
    x = np.zeros(600, dtype=np.float32)
    x[:300] = -0.0
    codes, scales = _quantize(x, which)
    assert (codes == rule.zero_code).all()
    assert (scales == 0).all()


def test_tiny_values_are_treated_alike_on_both_sides() -> None:
    """No sign fix: below half the smallest entry both signs become the code of 0."""
    y = np.array([1e-9, -1e-9, 2e-7, -2e-7, 4e-7, -4e-7], dtype=np.float32)
    assert _codes_of(y, "signed").tolist() == [127, 127, 127, 127, 128, 126]


@all_maps
def test_subnormal_and_huge_scales(which: str) -> None:
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, size=(40, 256))
    x = x if MAPS[which][0].signed else np.abs(x)
    x = (x * 10.0 ** np.linspace(-45, 38, 40)[:, None]).astype(np.float32)
    q.assert_encodes(*_quantize(x, which), x, MAPS[which][1])


def _rows_led_by_one(values: np.ndarray) -> np.ndarray:
    rows = np.ones((-(-values.size // 255), 256), dtype=np.float32)
    rows[:, 1:].flat[: values.size] = values
    return rows


def _random_rows(rule: q.Codec) -> np.ndarray:
    """The map, its mid-points with their neighbours, and random values, at the scale 2^-20."""
    mid, infinity = rule.midpoints.astype(np.float32), np.float32(np.inf)
    exact = [rule.values, mid, np.nextafter(mid, infinity), np.nextafter(mid, -infinity)]
    rng = np.random.default_rng(0)
    spread = 10 ** rng.uniform(-9, 0, 150_000) * rng.choice([-1, 1], 150_000)
    uniform = rng.uniform(-0.99296874, 1, 150_000)
    values = np.concatenate([*exact, spread, uniform, [1e-30, 1e-44, 0.0]]).astype(np.float32)
    values = np.maximum(values, rule.values[0]) if rule.values[0] < 0 else np.abs(values)
    return _rows_led_by_one(values) * np.float32(2.0**-20)


def _boundary_rows(rule: q.Codec, largest: float) -> np.ndarray:
    """Numbers next to every boundary at scales of any mantissa, subnormal and huge ones too."""
    mid = _rows_led_by_one(rule.midpoints).astype(np.float64)
    rng = np.random.default_rng(0)
    scales = np.concatenate([
        rng.uniform(0.5, 2, 300), 10 ** rng.uniform(-45, np.log10(largest), 300), [largest]
    ])  # fmt: skip
    rows = (scales[:, None, None] * mid[None]).astype(np.float32)
    near = [rows, np.nextafter(rows, np.float32(np.inf)), np.nextafter(rows, np.float32(0))]
    for other in near:
        other[:, :, 0] = rows[:, :, 0]
    return np.concatenate(near).reshape(-1, 256)


# The states of a step with betas of 0 under options: the moment, its map, and the oracle's codec.
STATES: dict[str, tuple[dict[str, Any], dict[str, tuple[quantmap.QuantizationMap, q.Codec]]]] = {
    "lines": (
        {},
        {
            "exp_avg": (quantmap.SIGNED, q.SIGNED_CODEC),
            "exp_avg_sq": (quantmap.UNSIGNED, q.UNSIGNED_CODEC),
        },
    ),
    "no floor": (
        {"second_moment_floor": False},
        {
            "exp_avg": (quantmap.SIGNED, q.SIGNED_CODEC),
            "exp_avg_sq": (quantmap.UNSIGNED, q.UNFLOORED_CODEC),
        },
    ),
    "symmetric": (
        {"signed_map": "symmetric"},
        {
            "exp_avg": (quantmap.SYMMETRIC, q.SYMMETRIC_CODEC),
            "exp_avg_sq": (quantmap.UNSIGNED, q.UNSIGNED_CODEC),
        },
    ),
}


def _defined_codes(x: np.ndarray, scales: np.ndarray, qmap: quantmap.QuantizationMap) -> np.ndarray:
    """The codes that `quantmap` defines, from quotients rounded as it says."""
    scale = np.where(scales > 0, scales, np.float32(1)).reshape(-1, 1).astype(np.float64)
    if qmap.lines is None:
        y = (x.astype(np.float64) / scale).astype(np.float32)
    else:  # a power of two keeps the reciprocal normal
        lift = np.where(scale < 2.0**-120, 2.0**80, np.where(scale > 2.0**120, 2.0**-80, 1.0))
        reciprocal = (1 / (scale * lift)).astype(np.float32).astype(np.float64)
        y = ((x * lift).astype(np.float32) * reciprocal).astype(np.float32)
    return np.searchsorted(np.array(qmap.firsts, np.float32), y, side="right")


@pytest.mark.parametrize("values", ["random", "boundary"])
@pytest.mark.parametrize("options", STATES)
def test_a_step_stores_the_exact_codes(options: str, values: str, backend: str) -> None:
    """With betas of 0 the moments are g and fl32(g^2): every code is known to the bit."""
    asked, states = STATES[options]
    for name, (qmap, rule) in states.items():
        x = _random_rows(rule) if values == "random" else _boundary_rows(rule, 1e19)
        g = np.sqrt(np.abs(x)) if name == "exp_avg_sq" else x
        p = torch.zeros(g.shape, requires_grad=True)
        p.grad = here(torch.from_numpy(g))
        optimizer = build_optimizer("adam8bit", [p], betas=(0.0, 0.0), **asked)
        optimizer.step()
        state, moment = optimizer.state[p], g if name == "exp_avg" else g * g
        codes, scales = (host(state[f"{name}_{kind}"]).numpy() for kind in ("q8", "absmax"))
        q.assert_encodes(codes, scales, moment, rule)
        want = _defined_codes(moment, scales, qmap)
        want = np.where(rule.floor & (moment > 0), np.maximum(want, 1), want)
        assert int((codes != want).sum()) == 0


def test_scale_of_the_largest_numbers_stays_finite() -> None:
    """-min / 0.993 overflows for the largest float32; the scale stops there."""
    top = np.finfo(np.float32).max
    x = np.array([[top, 1.0, 0.0], [-top, top / 2, 0.0]], dtype=np.float32)
    codes, scales = _quantize(x, "signed")
    q.assert_encodes(codes, scales, x, q.SIGNED_CODEC)
    assert np.isfinite(scales).all()


@all_maps
def test_elements_that_are_not_finite_do_not_enter_the_scale(which: str) -> None:
    x = np.full((3, 300), 0.25, dtype=np.float32)
    x[0, 3], x[1, 4], x[2, 299] = np.nan, np.inf, -np.inf
    codes, scales = _quantize(x, which)
    q.assert_encodes(codes, scales, x, MAPS[which][1])
    assert (scales == 0.25)[:2].all()
    assert codes[0, 3] == codes[1, 4] == codes[2, 299] == MAPS[which][1].zero_code


def _peer(module: str) -> Any:
    """A peer, imported without its own import-time warnings failing the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(module, exc_type=ImportError)


@pytest.mark.parametrize("signed", [True, False])
def test_maps_are_those_of_bitsandbytes(signed: bool) -> None:
    functional = _peer("bitsandbytes.functional")
    theirs = functional.create_dynamic_map(signed=signed).numpy().astype(np.float32)
    ours = np.array(quantmap.map_for(signed, "table").values, np.float32)
    np.testing.assert_array_max_ulp(theirs, ours, maxulp=2)
    # The peer computes its map with torch.linspace, whose last bit depends on the processor.
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert theirs.tobytes() == ours.tobytes()


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_those_of_torchao_off_the_boundaries(signed: bool) -> None:
    """torchao scales by max |x| and sends a tie up; both agree where neither matters."""
    utils = _peer("torchao.optim.quant_utils")
    which = "signed" if signed else "unsigned"
    rule = MAPS[which][1]
    x = np.random.default_rng(0).standard_normal((400, 256)).astype(np.float32)
    x = x if signed else np.abs(x)
    x[:, 3] = 1.01 * np.abs(x).max(axis=1)  # a positive extreme, so that the scales agree
    scaled, scales = utils.scale_tensor(torch.from_numpy(x).reshape(-1), 256)
    theirs = utils.quantize_8bit_with_qmap(scaled, torch.from_numpy(rule.values.copy()))
    codes, our_scales = _quantize(x, which)
    assert our_scales.reshape(-1).tobytes() == scales.numpy().tobytes()
    y = scaled.numpy().astype(np.float64)
    clear = q.nearest_code(y * (1 - 1e-6), rule) == q.nearest_code(y * (1 + 1e-6), rule)
    assert clear.mean() > 0.999
    assert (codes.reshape(-1) == theirs.numpy())[clear].all()
