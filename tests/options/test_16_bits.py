"""16-bit state: bfloat16, rounded at random by the documented hash; see test_state_rounding too."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from optfactory import build_optimizer, resolve
from tests.families import FAMILIES, states_of
from tests.numerics.harness import array
from tests.options.tools import assert_refused
from tests.reference.rounding import random_words, stochastic

WITH_STATES = [family for family in FAMILIES if states_of(family)]
# States become the gradient and its square.
FORGETFUL: dict[str, Any] = {"betas": (0.0, 0.0), "eps": 1e-3, "lr": 1e-3}


@pytest.mark.parametrize("shape", [(64, 512), (7, 300), (5001,), (3,)], ids=str)
def test_bits_are_those_of_the_rule(shape: tuple[int, ...], backend: str) -> None:
    p = torch.zeros(shape).requires_grad_()
    p.grad = torch.from_numpy(np.random.default_rng(0).normal(size=shape)).float()
    optimizer = build_optimizer("adam16bit", [p], seed=77, **FORGETFUL)
    optimizer.step()
    state, g = optimizer.state[p], array(p.grad)
    squares = (g.astype(np.float32) ** 2).astype(np.float64)
    for index, (name, x) in enumerate({"exp_avg": g, "exp_avg_sq": squares}.items()):
        assert state[name].dtype == torch.bfloat16
        words = random_words(77, 0, 1, x.size, index).reshape(shape) >> np.uint32(16)
        assert (array(state[name]) == stochastic(x, words, torch.bfloat16)).all(), name


def test_the_mean_is_the_number(backend: str) -> None:
    """Over many seeds; to nearest, numbers are off by up to 0.4 %."""
    found = []
    g = 10 ** torch.linspace(-6, 3, 4096)
    for seed in range(1, 65):
        p = torch.zeros(4096).requires_grad_()
        p.grad = g.clone()
        optimizer = build_optimizer("adam16bit", [p], seed=seed, **FORGETFUL)
        optimizer.step()
        found.append(array(optimizer.state[p]["exp_avg"]))
    relative = np.mean(found, axis=0) / array(g) - 1
    assert abs(relative.mean()) < 5e-5
    assert np.abs(relative).max() < 2.5e-3


@pytest.mark.parametrize("number", [float("inf"), float("-inf"), float("nan"), 3.4e38])
def test_numbers_that_are_not_finite_stay_so(number: float, backend: str) -> None:
    """As at 32 bits: a state that is none must not become an ordinary number."""
    p = torch.zeros(64).requires_grad_()
    p.grad = torch.full((64,), number)
    optimizer = build_optimizer("lion16bit", [p], betas=(0.0, 0.0), seed=1)
    optimizer.step()
    got = optimizer.state[p]["exp_avg"].float()
    if number == 3.4e38:  # between the greatest number and infinity
        assert set(got.tolist()) <= {float(torch.finfo(torch.bfloat16).max), float("inf")}
    else:
        assert got.isnan().all() if number != number else (got == number).all()


@pytest.mark.parametrize("family", WITH_STATES)
@pytest.mark.parametrize("other", [8, 32])
def test_checkpoints_of_other_widths(family: str, other: int) -> None:
    """What bfloat16 holds comes to 32 bits and back as it was; to 8 bits by the nearest codes."""
    shape = (64, 64)
    p = torch.randn(shape).requires_grad_()
    half = build_optimizer(family, [p], optim_bits=16)
    for _ in range(3):
        p.grad = torch.randn(shape)
        half.step()
    wide = build_optimizer(family, [p], optim_bits=other)
    wide.load_state_dict(half.state_dict())
    back = build_optimizer(family, [p], optim_bits=16)
    back.load_state_dict(wide.state_dict())
    for state in states_of(half.config):
        before, after = half.state[p][state.name].float(), back.state[p][state.name].float()
        if other == 32:
            assert torch.equal(wide.state[p][state.name], before)
            assert torch.equal(after, before)
        else:
            assert (after - before).abs().max() <= 0.04 * before.abs().max()
    assert (back.state[p]["step"], wide.state[p]["step"]) == (3, 3)


def test_four_bytes_a_parameter() -> None:
    p = torch.zeros(1024, 1024).requires_grad_()
    report = build_optimizer("adamw16bit", [p]).memory_report()
    assert report.state_bytes == 4 * p.numel() + 8
    assert {row.bits for row in report.rows} == {16}


def test_refused() -> None:
    assert_refused("compat", "adamw16bit", compat="bitsandbytes")
    assert_refused("amsgrad", "adamw16bit", amsgrad=True)
    assert_refused("centered", "rmsprop16bit", centered=True)
    assert_refused("momentum", "sgd16bit", momentum=0.0)
    assert_refused("block_size", "adamw16bit", block_size=64)
    assert_refused("optim_bits", "adamw16bit", optim_bits=8)
    assert resolve("adamw16bit", seed=3).seed == 3
