"""trust_ratio_bounds and always_adapt: what LAMB's ratio may become, and when there is none."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from optfactory import build_optimizer
from tests.numerics.harness import Twin, parameters
from tests.options.tools import SMALL, assert_refused, assert_resumes, seen, train, trained, widths

SHAPE = (64, 300)
modes = pytest.mark.parametrize("mode", ["lamb", "clip"])


def _parameter(scale: float, shape: tuple[int, ...] = SHAPE) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return (scale * torch.randn(shape, generator=generator)).requires_grad_()


@pytest.mark.parametrize(("scale", "bounds", "want"), [
    (100.0, (0.0, 10.0), 10.0),
    (100.0, [0.0, 1.5], 1.5),
    (0.01, (0.5, 10.0), 0.5),
    (0.01, (2.0, 2.0), 2.0),
    (100.0, (0.0, 0.0), 0.0),
    (100.0, (0.0, math.inf), None),
    (0.01, (1e-4, 100.0), None),
])  # fmt: skip
@widths
def test_the_ratio_stays_within_bounds(
    width: int, scale: float, bounds: Any, want: float | None, backend: str
) -> None:
    twin = Twin("lamb", [_parameter(scale)], optim_bits=width, lr=1e-2, trust_ratio_bounds=bounds)
    for step in range(3):
        (update,) = twin.step(step)
        if want is not None:
            assert update.ratio == pytest.approx(want)
        else:
            assert bounds[0] < update.ratio < bounds[1]


@pytest.mark.parametrize("bounds", [(0.0, 0.25), (0.5, 1.0), (2.0, 3.0)])
@widths
def test_bounds_of_the_clipped_ratio(width: int, bounds: tuple[float, float], backend: str) -> None:
    for scale in (0.3, 100.0):
        asked = {"trust_ratio": "clip", "trust_ratio_bounds": bounds, "lr": 1e-2}
        twin = Twin("lamb", [_parameter(scale)], optim_bits=width, **asked)
        (update,) = twin.step(0)
        assert bounds[0] <= update.ratio <= bounds[1]
        twin.step(1)


@modes
@widths
def test_a_ratio_of_one_for_zero_norms_is_not_bounded(width: int, mode: str, backend: str) -> None:
    """Neither for a tensor of zeros nor for an update of zeros."""
    for bounds in ((0.0, 0.1), (5.0, 10.0)):
        asked = {"trust_ratio": mode, "trust_ratio_bounds": bounds, "weight_decay": 0.0}
        for p, grads in (
            (torch.zeros(SHAPE), None),
            (torch.ones(SHAPE), [torch.zeros(SHAPE)]),
        ):
            twin = Twin("lamb", [p.requires_grad_()], optim_bits=width, lr=1e-2, **asked)
            (update,) = twin.step(0, grads)
            assert update.ratio == 1.0


def test_nan_takes_the_ratio_one(backend: str) -> None:
    p = _parameter(1.0)
    with torch.no_grad():
        p[0, 0] = float("nan")
    twin = Twin("lamb", [p], trust_ratio_bounds=(5.0, 10.0))
    (update,) = twin.step(0)
    assert update.ratio == 1.0


@modes
@widths
def test_no_ratio_without_decay_unless_asked_for(width: int, mode: str, backend: str) -> None:
    """timm's and apex' rule for groups of biases and norms: they take Adam's steps."""
    asked: dict[str, Any] = {"optim_bits": width, "lr": 1e-2, "trust_ratio": mode}
    for decay, adapts, changed in ((0.0, False, False), (0.0, True, True), (0.1, False, True)):
        p = _parameter(0.01)
        twin = Twin("lamb", [p], **asked, weight_decay=decay, always_adapt=adapts)
        for step in range(3):
            (update,) = twin.step(step)
            assert (update.ratio != 1.0) == changed


@widths
def test_each_group_by_its_own_decay(width: int, backend: str) -> None:
    """Two groups of one optimizer; the one without decay takes the plain step."""
    params = [_parameter(0.01), _parameter(0.01)]
    groups = [{"params": params[:1], "weight_decay": 0.1}, {"params": params[1:]}]
    asked = {"optim_bits": width, "weight_decay": 0.0, "always_adapt": False, "lr": 1e-2}
    optimizer = build_optimizer("lamb", groups, **asked)
    before = [p.detach().clone() for p in params]
    train(optimizer, [0])
    lengths = [float((p.detach() - b).norm()) for p, b in zip(params, before, strict=True)]
    assert lengths[0] < 0.1 * lengths[1]


@widths
def test_off_by_default(width: int, backend: str) -> None:
    default = trained("lamb", optim_bits=width)
    for asked in (
        {"trust_ratio_bounds": None},
        {"trust_ratio_bounds": (0.0, math.inf)},
        {"always_adapt": True},
        {"always_adapt": False},  # the default decay is not 0
    ):
        assert trained("lamb", optim_bits=width, **asked) == default


@widths
def test_bounds_that_are_not_reached_change_nothing(width: int, backend: str) -> None:
    runs = []
    for asked in ({}, {"trust_ratio_bounds": (1e-6, 1e6)}):
        optimizer = build_optimizer(
            "lamb", parameters(torch.float32, SMALL), optim_bits=width, **asked
        )
        train(optimizer, range(3))
        runs.append(seen(optimizer))
    assert runs[0] == runs[1]


@widths
def test_resumes_bit_for_bit(width: int, backend: str) -> None:
    asked = {"trust_ratio_bounds": (0.1, 0.2), "always_adapt": False, "weight_decay": 0.1}
    assert_resumes("lamb", optim_bits=width, **asked)


@pytest.mark.parametrize("bounds", [
    (2.0, 1.0), (-1.0, 1.0), (0.0, math.nan), (1.0,), (0.0, 1.0, 2.0), "wide", 3.0
], ids=str)  # fmt: skip
def test_refused_bounds(bounds: Any) -> None:
    assert_refused("trust_ratio_bounds", "lamb", trust_ratio_bounds=bounds)


@pytest.mark.parametrize("family", ["adam", "adamw"])
def test_adam_has_no_ratio(family: str) -> None:
    assert_refused("trust_ratio_bounds", family, trust_ratio_bounds=(0.0, 1.0))
    assert_refused("always_adapt", family, always_adapt=False)
