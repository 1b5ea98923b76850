"""Results against float64 decompositions, torch.optim.Muon, and each other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.optim._muon import _zeropower_via_newtonschulz

from optfactory.errors import ConfigError
from optfactory.matrix import orthogonalize as module
from optfactory.matrix import scratch
from optfactory.matrix.coefficients import steps_of
from optfactory.matrix.orthogonalize import Orthogonalization, dtype_for, orthogonalize, restarts
from tests.defaults import DEFAULTS, default
from tests.matrix.harness import (
    MUON,
    POLAR_EXPRESS,
    ROUNDED,
    SHAPES,
    distance,
    matrix,
    outside,
    stack,
)

by_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


# Of random matrices; squares of singular values have half the digits.
BOUNDS = {"gram": 1e-3, "direct": 2e-5}


@pytest.fixture(params=["gram", "direct"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to iterate in float32."""
    monkeypatch.setattr(scratch, "_GRAM_RATIO", 1.0 if request.param == "gram" else 1e9)
    return str(request.param)


@by_shape
@pytest.mark.parametrize(("name", "count"), [("muon", 1), ("muon", 5), ("you", 5), ("muon", 12)])
def test_singular_values_go_through_the_polynomials(
    shape: tuple[int, int], name: str, count: int, way: str
) -> None:
    how = Orthogonalization(steps_of(name, count))
    x = stack(matrix(*shape), matrix(*shape, seed=1))
    assert distance(orthogonalize(x, how), x, how) < BOUNDS[way]


@pytest.mark.parametrize("shape", [*SHAPES, (600, 520), (300, 520)], ids=str)
def test_each_shape_goes_the_way_that_is_exact(shape: tuple[int, int]) -> None:
    x = stack(matrix(*shape))
    assert distance(orthogonalize(x, MUON), x, MUON) < 2e-5


@by_shape
def test_polar_express_comes_near_to_the_polar_factor(shape: tuple[int, int], way: str) -> None:
    x = matrix(*shape)
    if shape[0] == shape[1] > 1:  # keep the smallest singular value in the sets' range
        x = matrix(*shape, np.geomspace(1, 0.01, shape[0]))
    result = orthogonalize(stack(x), POLAR_EXPRESS)[0].double().numpy()
    u, _, vt = np.linalg.svd(x, full_matrices=False)
    assert np.abs(result - u @ vt).max() < 1e-3


@pytest.mark.parametrize("low", [1e-3, 1e-6])
@pytest.mark.parametrize("how", [MUON, POLAR_EXPRESS], ids=["muon", "polar_express"])
def test_small_singular_values_are_kept_apart(how: Orthogonalization, low: float, way: str) -> None:
    x = stack(matrix(96, 200, np.geomspace(1, low, 96)))
    assert distance(orthogonalize(x, how), x, how) < 3e-3


@by_shape
@pytest.mark.parametrize("how", [MUON, ROUNDED], ids=["float32", "bfloat16"])
def test_a_transposed_matrix_has_the_transposed_result(
    shape: tuple[int, int], how: Orthogonalization, way: str
) -> None:
    x = stack(matrix(*shape))
    assert torch.allclose(orthogonalize(x.mT, how), orthogonalize(x, how).mT, rtol=0, atol=2e-2)
    if how is MUON:
        assert torch.allclose(orthogonalize(x.mT, how), orthogonalize(x, how).mT, atol=1e-3)


@pytest.mark.parametrize("shape", [(64, 64), (160, 256), (256, 160)], ids=str)
def test_rounded_products_agree_with_torchs_muon(shape: tuple[int, int]) -> None:
    x = stack(matrix(*shape))
    theirs = _zeropower_via_newtonschulz(x[0], MUON.steps[0], 5, 1e-7).float()
    ours = orthogonalize(x, ROUNDED)[0]
    assert (ours - theirs).norm() < 0.06 * theirs.norm()
    assert distance(ours[None], x, MUON) < 0.05
    assert distance(theirs[None], x, MUON) < 0.05


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize(
    ("how", "bound"), [(MUON, 1e-6), (ROUNDED, 1e-3)], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize("shape", [(192, 192), (192, 320), (320, 192)], ids=str)
def test_results_stay_in_the_matrixs_span(
    shape: tuple[int, int], rank: int, how: Orthogonalization, bound: float, way: str
) -> None:
    x = stack(matrix(*shape, np.linspace(1, 0.5, rank)))
    result = orthogonalize(x, how)[0].double().numpy()
    assert outside(result, x[0].numpy(), rank) < bound
    theirs = _zeropower_via_newtonschulz(x[0], how.steps[0], 5, 1e-7).double().numpy()
    assert outside(theirs, x[0].numpy(), rank) > 0.1


@by_shape
@pytest.mark.parametrize("how", [MUON, ROUNDED], ids=["float32", "bfloat16"])
def test_bits_do_not_depend_on_the_rest_of_the_stack(
    shape: tuple[int, int], how: Orthogonalization, way: str
) -> None:
    x = torch.randn(9, *shape)
    x[4] *= 1e4
    whole = orthogonalize(x, how)
    for part in (slice(0, 1), slice(4, 5), slice(1, 3), slice(3, 9)):
        assert torch.equal(orthogonalize(x[part], how), whole[part])


@pytest.mark.parametrize("how", [MUON, ROUNDED], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_matrix_that_is_not_finite_spoils_itself_only(
    how: Orthogonalization, bad: float, way: str
) -> None:
    x = torch.randn(3, 20, 30)
    clean = orthogonalize(x, how)
    x[1, 2, 3] = bad
    result = orthogonalize(x, how)
    assert torch.equal(result[[0, 2]], clean[[0, 2]])
    assert not result[1].isfinite().all()


@pytest.mark.parametrize("how", [MUON, ROUNDED], ids=["float32", "bfloat16"])
def test_zeros_stay_zeros_and_small_norms_count_as_eps(how: Orthogonalization, way: str) -> None:
    x = torch.randn(2, 20, 30)
    x[0] = 0
    x[1] *= 1e-9 / x[1].norm()
    result = orthogonalize(x, how)
    assert not result[0].any()
    assert distance(result[1:], x[1:], how) < (1e-4 if how is MUON else 0.05)
    assert result[1].norm() < 0.01 * 485  # 1e-9 / 1e-7 of the slope at 0
    assert orthogonalize(x[1:], replace(how, eps=1e-12)).norm() > 1


@pytest.mark.parametrize("scale", [1e-15, 1e-3, 1e15])
def test_the_scale_does_not_matter(scale: float, way: str) -> None:
    x, how = torch.randn(1, 20, 30), replace(MUON, eps=0.0)
    result = orthogonalize(x * scale, how)
    assert torch.allclose(result, orthogonalize(x, how), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_dtype_and_strides_are_read_and_nothing_is_written(dtype: torch.dtype) -> None:
    base = torch.randn(5, 30, 24).to(dtype)
    x = base.mT[::2]
    before = base.clone()
    result = orthogonalize(x, MUON)
    assert torch.equal(result, orthogonalize(x.float().contiguous(), MUON))
    assert torch.equal(base, before)
    assert result.dtype == torch.float32


@pytest.mark.parametrize("how", [MUON, POLAR_EXPRESS, ROUNDED], ids=["5", "8", "bfloat16"])
@pytest.mark.parametrize("steps", [1, 2])
def test_the_result_may_take_the_matrices_place(
    how: Orthogonalization, steps: int, way: str
) -> None:
    how = replace(how, steps=how.steps[steps:])
    x = torch.randn(3, 20, 30)
    expected = orthogonalize(x, how)
    assert orthogonalize(x, how, out=x) is x
    assert torch.equal(x, expected)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty_stacks_have_empty_results(shape: tuple[int, int, int]) -> None:
    assert orthogonalize(torch.randn(shape), MUON).shape == shape


@pytest.mark.parametrize("chosen", DEFAULTS)
@pytest.mark.parametrize("how", [MUON, ROUNDED], ids=["float32", "bfloat16"])
def test_torchs_modes_change_nothing(how: Orthogonalization, chosen: str) -> None:
    x = torch.randn(2, 20, 30, requires_grad=True)
    expected = orthogonalize(x, how)
    assert not expected.requires_grad
    with default(chosen):
        assert torch.equal(orthogonalize(x, how), expected)
    with torch.inference_mode():
        assert torch.equal(orthogonalize(x, how), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(orthogonalize(x, how), expected)


def test_the_gram_matrix_is_computed_again_before_its_errors_matter() -> None:
    assert restarts(steps_of("muon", 5)) == ()
    assert restarts(steps_of("polar_express", 5)) == ()
    assert restarts(steps_of("polar_express", 10)) == (5,)
    assert restarts(steps_of("muon", 20)) == (6, 12, 18)


def test_lower_precision_of_float32_products_is_noticed() -> None:
    x = torch.randn(1, 20, 30)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert not module.multiplies_exactly("cpu")
        assert distance(orthogonalize(x, MUON), x, MUON) < 0.05
    finally:
        torch.set_float32_matmul_precision(before)
    assert module.multiplies_exactly("cpu")


def test_auto_is_float32_where_bfloat16_products_have_bfloat16_results() -> None:
    assert dtype_for("auto", "cpu") == dtype_for("float32", "cuda") == torch.float32
    assert dtype_for("bfloat16", "cpu") == torch.bfloat16
    fast = hasattr(torch.ops.aten.baddbmm, "dtype_out")
    assert dtype_for("auto", "cuda") == (torch.bfloat16 if fast else torch.float32)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"out": torch.empty(2, 3, 5)}, r"out: \[2, 3, 5\] .* does not fit matrices \[2, 3, 4\]"),
        ({"out": torch.empty(2, 3, 4, dtype=torch.float64)}, "of torch.float64"),
        ({"out": torch.empty(2, 4, 3).mT}, "contiguous"),
        ({"scratch": torch.empty(9, dtype=torch.uint8)}, "scratch: 9 bytes .* are needed"),
        ({"scratch": torch.empty(10_000)}, "scratch: 0 bytes of torch.float32"),
    ],
)
def test_what_does_not_fit_is_refused(kwargs: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        orthogonalize(torch.randn(2, 3, 4), MUON, **kwargs)
    with pytest.raises(ConfigError, match="three dimensions"):
        orthogonalize(torch.randn(3, 4), MUON)
