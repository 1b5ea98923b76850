"""skip_zeros and nonfinite: elements or whole steps that change nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from optfactory import build_optimizer
from tests.families import known_to, states_of
from tests.numerics.harness import DTYPES, Twin, array, gradient, parameters
from tests.options.tools import (
    SHAPES,
    SMALL,
    assert_refused,
    assert_resumes,
    element_wise,
    families,
    mask_of,
    seen,
    train,
    trained,
    widths,
)

BAD = {"nan": float("nan"), "inf": float("inf"), "minus_inf": float("-inf")}
SHAPE = (20, 300)
DECAYS: dict[str, dict[str, Any]] = {
    "none": {"weight_decay": 0.0},
    "decoupled": {"weight_decay": 0.1, "lr": 0.01, "adam_w_mode": True},
    "l2": {"weight_decay": 0.1, "lr": 0.01, "adam_w_mode": False},
}
decays = pytest.mark.parametrize("decay", DECAYS)


@decays
@widths
@element_wise
def test_skip_zeros_follows_the_reference(
    family: str, width: int, decay: str, backend: str
) -> None:
    asked = {"optim_bits": width, "skip_zeros": True, **known_to(family, DECAYS[decay])}
    twin = Twin(family, parameters(torch.float32, SHAPES), **asked)
    for step in range(4):
        twin.step(step)
    if width == 8:
        twin.count.check()


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@element_wise
def test_skip_zeros_in_16_bits(family: str, dtype: str, backend: str) -> None:
    for width in (32, 8):
        twin = Twin(family, parameters(DTYPES[dtype], SMALL), optim_bits=width, skip_zeros=True)
        for step in range(3):
            twin.step(step)


@decays
@widths
@element_wise
def test_a_skipped_element_keeps_everything(
    family: str, width: int, decay: str, backend: str
) -> None:
    """Also where the gradient is -0, and at 32 bits its states to the bit."""
    (p,) = parameters(torch.float32, [SHAPE])
    asked = {"optim_bits": width, "skip_zeros": True, **known_to(family, DECAYS[decay])}
    optimizer = build_optimizer(family, [p], **asked)
    train(optimizer, range(2))
    zeros = mask_of(SHAPE, 7)
    before = p.detach().clone()
    states = {key: tensor.clone() for key, tensor in optimizer.state[p].items()}
    g = gradient(SHAPE, torch.float32, 99)
    g = torch.where(g == 0, 0.5, g)
    p.grad = torch.where(zeros, torch.where(mask_of(SHAPE, 8, 0.5), -0.0, 0.0), g)
    optimizer.step()
    assert torch.equal(p[zeros], before[zeros])
    assert (p[~zeros] != before[~zeros]).float().mean() > 0.99
    if width == 32:
        for key in (state.name for state in states_of(family)):
            assert torch.equal(optimizer.state[p][key][zeros], states[key][zeros])


@widths
@element_wise
def test_skipping_zeros_changes_nothing_for_the_others(
    family: str, width: int, backend: str
) -> None:
    """Without zeros in the gradient the option does nothing."""
    runs = []
    for asked in ({}, {"skip_zeros": True}, {"skip_zeros": False}, {"nonfinite": "skip_element"}):
        params = parameters(torch.float32, SMALL)
        optimizer = build_optimizer(family, params, optim_bits=width, **asked)
        for step in range(3):
            for i, p in enumerate(params):
                g = gradient(tuple(p.shape), torch.float32, 10 * step + i)
                p.grad = torch.where(g == 0, 0.01, g)
            optimizer.step()
        runs.append(seen(optimizer))
    assert all(run == runs[0] for run in runs)


def test_the_amsgrad_maximum_is_kept_too(backend: str) -> None:
    twin = Twin("adamw", parameters(torch.float32, SMALL), amsgrad=True, skip_zeros=True)
    for step in range(3):
        twin.step(step)


def _with_bad(step: int, value: float) -> torch.Tensor:
    g = gradient(SHAPE, torch.float32, step)
    g[3, 5] = value
    g[7, 299] = value
    g[19, :256] = value  # a whole block
    return g


@pytest.mark.parametrize("bad", BAD)
@widths
@element_wise
def test_skip_element_follows_the_reference(
    family: str, width: int, bad: str, backend: str
) -> None:
    asked = {"optim_bits": width, "nonfinite": "skip_element", "weight_decay": 0.1, "lr": 0.01}
    twin = Twin(family, parameters(torch.float32, [SHAPE]), **asked)
    for step in range(4):
        before = twin.params[0].detach().clone()
        g = _with_bad(step, BAD[bad]) if step in (0, 2) else gradient(SHAPE, torch.float32, step)
        twin.step(step, [g])
        if step in (0, 2):
            hurt = ~torch.isfinite(g)
            assert torch.equal(twin.params[0][hurt], before[hurt])
    assert torch.isfinite(twin.params[0]).all()


@widths
@element_wise
def test_a_bad_element_is_skipped_as_a_zero_is(family: str, width: int, backend: str) -> None:
    runs = []
    for value, asked in (
        (float("nan"), {"nonfinite": "skip_element"}),
        (float("inf"), {"nonfinite": "skip_element"}),
        (0.0, {"skip_zeros": True}),
    ):
        (p,) = parameters(torch.float32, [SHAPE])
        optimizer = build_optimizer(family, [p], optim_bits=width, weight_decay=0.1, **asked)
        for step in range(3):
            g = _with_bad(step, value)
            mask = _with_bad(step, float("nan")).isnan()
            p.grad = torch.where((g == 0) & ~mask, 0.01, g)
            optimizer.step()
        runs.append(seen(optimizer))
    assert runs[0] == runs[1] == runs[2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", BAD)
@widths
@families
def test_skip_step_changes_nothing(
    family: str, width: int, bad: str, dtype: str, backend: str
) -> None:
    """One bad element in the last tensor spoils the step of all."""
    params = parameters(DTYPES[dtype], [*SMALL, (3, 5)])
    optimizer = build_optimizer(family, params, optim_bits=width, nonfinite="skip_step")
    train(optimizer, range(2))
    before = seen(optimizer)
    for place in (0, 2):
        for i, p in enumerate(params):
            p.grad = gradient(tuple(p.shape), p.dtype, 70 + i)
        params[place].grad.view(-1)[-1] = BAD[bad]
        optimizer.step()
        assert seen(optimizer) == before
    train(optimizer, range(2, 4))
    after = seen(optimizer)
    assert after != before
    clean = build_optimizer(family, parameters(DTYPES[dtype], [*SMALL, (3, 5)]), optim_bits=width)
    train(clean, range(4))
    assert seen(clean) == after


def test_skip_step_before_the_first_step(backend: str) -> None:
    params = parameters(torch.float32, SMALL)
    start = [p.detach().clone() for p in params]
    optimizer = build_optimizer("adam", params, nonfinite="skip_step", percentile_clipping=5)
    params[0].grad = torch.full(SMALL[0], float("nan"))
    params[1].grad = torch.ones(SMALL[1])
    optimizer.step()
    for p, old in zip(params, start, strict=True):
        assert torch.equal(p, old)
        for tensor in optimizer.state[p].values():
            assert not tensor.to(torch.float32).any()


def test_skip_step_covers_groups_of_other_kinds(backend: str) -> None:
    """Widths, dtypes and learning rates of their own; the bad gradient is in the second group."""
    one, two = parameters(torch.float32, SMALL), parameters(torch.bfloat16, SMALL)
    groups = [{"params": one}, {"params": two, "optim_bits": 8, "lr": 0.1}]
    optimizer = build_optimizer("lamb", groups, nonfinite="skip_step")
    train(optimizer, range(2))
    before = seen(optimizer)
    for p in (*one, *two):
        p.grad = gradient(tuple(p.shape), p.dtype, 5)
    two[0].grad[2, 2] = float("inf")
    optimizer.step()
    assert seen(optimizer) == before


@pytest.mark.parametrize("asked", [
    {"percentile_clipping": 5}, {"param_rounding": "kahan"},
    {"param_rounding": "stochastic", "seed": 0},
], ids=str)  # fmt: skip
def test_skip_step_leaves_other_options_states(asked: dict[str, Any], backend: str) -> None:
    """A run with bad steps in between is the run without them, to the bit."""
    runs = []
    for bad_steps in ((), (1, 2, 4)):
        params = parameters(torch.bfloat16, SMALL)
        optimizer = build_optimizer("adamw", params, nonfinite="skip_step", **asked)
        for step in range(3):
            if step + 1 in bad_steps:
                for p in params:
                    p.grad = torch.full_like(p, float("nan"))
                optimizer.step()
            train(optimizer, [step])
        runs.append(seen(optimizer))
    assert runs[0] == runs[1]


@widths
def test_finite_numbers_skip_nothing(width: int, backend: str) -> None:
    """Huge gradients and infinite parameters are no reason to skip."""
    runs = []
    for asked in ({}, {"nonfinite": "skip_step"}):
        (p,) = parameters(torch.float32, [SHAPE])
        with torch.no_grad():
            p[1, 1] = float("inf")
        optimizer = build_optimizer("adam", [p], optim_bits=width, **asked)
        for step in range(3):
            p.grad = gradient(SHAPE, torch.float32, step)
            p.grad[0, 0] = 3e38
            p.grad[0, 1:] = 3e38  # the sum of squares overflows, and that of the elements
            optimizer.step()
        runs.append(seen(optimizer))
    assert runs[0] == runs[1]
    assert b"\x00" * 4 not in (runs[0]["p0.step"],)


@pytest.mark.parametrize("nonfinite", ["skip_element", "skip_step"])
@element_wise
def test_resumes_bit_for_bit(family: str, nonfinite: str, backend: str) -> None:
    for width in (32, 8):
        assert_resumes(family, optim_bits=width, nonfinite=nonfinite, skip_zeros=True)


@families
def test_off_by_default(family: str, backend: str) -> None:
    for width in (32, 8):
        default = trained(family, optim_bits=width)
        off = trained(family, optim_bits=width, skip_zeros=False, nonfinite="propagate")
        assert off == default
        assert trained(family, optim_bits=width, nonfinite="skip_step") == default


@families
def test_refused_values(family: str) -> None:
    assert_refused("nonfinite", family, nonfinite="skip")
    assert_refused("skip_zeros", family, skip_zeros="some")


@widths
def test_lamb_counts_a_skipped_direction_as_zero(width: int, backend: str) -> None:
    """Half the elements skipped, their parameters large: |p| has them, |u| has not."""
    p = torch.full((20, 300), 0.1)
    p[:, ::2] = 10.0
    p.requires_grad_()
    asked = {"optim_bits": width, "skip_zeros": True, "lr": 1e-3, "weight_decay": 0.1}
    twin = Twin("lamb", [p], **asked)
    g = gradient((20, 300), torch.float32, 3)
    g[:, ::2] = 0.0
    g[:, 1::2] = 1.0
    (update,) = twin.step(0, [g])
    length = (3000 * 100.0 + 3000 * 0.01) ** 0.5 / (3000 * 1.01**2) ** 0.5
    assert update.ratio == pytest.approx(length, rel=1e-4)
    assert (array(p)[:, ::2] == 10.0).all()
