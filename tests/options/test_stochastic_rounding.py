"""Stochastic rounding of 16-bit parameters: by the documented hash, unbiased, never needless."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from optfactory import build_optimizer
from tests.numerics.harness import DTYPES, array, assert_between, bits, gradient
from tests.numerics.harness import parameters as made
from tests.options.tools import assert_refused, families, halves, widths
from tests.reference.rounding import random_words, stochastic

KAHAN: dict[str, Any] = {"param_rounding": "kahan"}
STOCHASTIC: dict[str, Any] = {"param_rounding": "stochastic"}


@halves
def test_stochastic_rounding_is_unbiased(dtype: str, backend: str) -> None:
    """The mean over many elements and seeds is the float32 result."""
    p0 = 1 + torch.arange(20_000, dtype=torch.float64) / 40_000
    p0 = p0.to(DTYPES[dtype])
    errors = []
    for seed in range(5):
        p = p0.clone().requires_grad_()
        p.grad = torch.ones_like(p)
        build_optimizer("adam", [p], lr=1e-4, eps=0.0, seed=seed, **STOCHASTIC).step()
        errors.append(p.detach().double() - (p0.double() - 1e-4))
    unit = float(torch.finfo(DTYPES[dtype]).eps)
    share = min(1e-4 / unit, 1)
    bound = 5 * unit * (share * (1 - share)) ** 0.5 / (5 * 20_000) ** 0.5
    assert abs(float(torch.stack(errors).mean())) < bound + 2e-7


@halves
@widths
def test_numbers_that_need_no_rounding_stay(dtype: str, width: int, backend: str) -> None:
    """Any random bits leave a representable number alone, the subnormal ones too."""
    p0 = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(DTYPES[dtype])
    p0 = p0[torch.isfinite(p0)].repeat(20)
    p = p0.clone().requires_grad_()
    asked = {"optim_bits": width, "weight_decay": 0.0, "seed": 3, **STOCHASTIC}
    optimizer = build_optimizer("adam", [p], **asked)
    for _ in range(3):
        p.grad = torch.zeros_like(p)
        optimizer.step()
        changed = bits(p) != bits(p0)
        assert not changed.any(), f"{changed.sum()} bytes changed"


@halves
def test_every_number_is_rounded_by_the_rule(dtype: str, backend: str) -> None:
    """With betas of 0 and g = 1 the step is lr alone: p - lr, over normal and subnormal numbers."""
    rng = np.random.default_rng(0)
    size = 2**18
    p0 = 10 ** rng.uniform(-8.5, 4.5, size) * rng.choice([-1, 1], size)
    p = torch.from_numpy(p0).to(DTYPES[dtype]).requires_grad_()
    before = array(p)
    lr = 3e-6
    p.grad = torch.ones_like(p)
    asked = {"betas": (0.0, 0.0), "eps": 0.0, "lr": lr, "seed": 77, **STOCHASTIC}
    build_optimizer("adam", [p], **asked).step()
    value = (before - float(np.float32(lr))).astype(np.float32).astype(np.float64)
    want = stochastic(value, random_words(77, 0, 1, size), DTYPES[dtype])
    near = [np.nextafter(np.float32(value), np.float32(s)).astype(np.float64) for s in (-1e9, 1e9)]
    random = random_words(77, 0, 1, size)
    assert_between(array(p), *(stochastic(x, random, DTYPES[dtype]) for x in near), "p")
    assert (array(p) == want).mean() > 0.999


def test_the_seed_the_step_and_the_parameter_decide(backend: str) -> None:
    shape = (4096,)

    def noise(seed: int, number: int, steps: int = 1) -> bytes:
        params = [torch.ones(shape, dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
        optimizer = build_optimizer("adam", params, lr=1e-3, seed=seed, **STOCHASTIC)
        for _ in range(steps):
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()
        return bits(params[number]).tobytes()

    assert noise(5, 1) == noise(5, 1)
    assert len({noise(5, 0), noise(5, 1), noise(5, 2), noise(6, 0), noise(0, 0)}) == 5
    assert noise(5, 0, 2) != noise(5, 0, 1)


def test_parameters_are_numbered_across_groups(backend: str) -> None:
    """The bits do not depend on which bucket, width or group a parameter is in."""
    dtypes = [torch.bfloat16, torch.float32, torch.float16, torch.bfloat16]
    params = [made(dtype, [(70, 64)])[0] for dtype in dtypes]
    groups = [{"params": params[:2]}, {"params": params[2:], "optim_bits": 8}]
    asked = {"lr": 0.01, "betas": (0.0, 0.0), "eps": 0.0, "seed": 9, **STOCHASTIC}
    before = [array(p) for p in params]
    g = gradient((70, 64), torch.float32, 1)
    g = torch.where(g.abs() < 1e-3, 1.0, g)
    for p in params:
        p.grad = g.to(p.dtype)
    build_optimizer("adam", groups, **asked).step()
    for number in (0, 2, 3):
        random = random_words(9, number, 1, g.numel()).reshape(g.shape)
        exact = before[number] - 0.01 * np.sign(g.numpy())
        bounds = [
            stochastic(np.float32(exact + error).astype(np.float64), random, dtypes[number])
            for error in (-3e-9, 3e-9)
        ]
        assert_between(array(params[number]), *bounds, f"parameter {number}")


@pytest.mark.parametrize("asked", [
    {"seed": 1}, KAHAN | {"seed": 1}, STOCHASTIC | {"seed": -1}, STOCHASTIC | {"seed": 2**24},
    STOCHASTIC | {"seed": 1.5},
], ids=str)  # fmt: skip
@families
def test_refused_seeds(family: str, asked: dict[str, Any]) -> None:
    params = [torch.zeros(8, dtype=torch.bfloat16).requires_grad_()]
    assert_refused("seed", family, params, **asked)
