"""param_rounding and seed: 16-bit parameters stored to nearest, stochastically, or compensated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from optfactory import build_optimizer
from tests.numerics.harness import DTYPES, Twin, bits, gradient, own_parameters
from tests.numerics.harness import parameters as made
from tests.options.tools import (
    SHAPES,
    SMALL,
    assert_refused,
    assert_resumes,
    copies,
    families,
    halves,
    moved,
    train,
    trained,
    widths,
    without,
)

STOCHASTIC: dict[str, Any] = {"param_rounding": "stochastic", "seed": 0}
KAHAN: dict[str, Any] = {"param_rounding": "kahan"}
ways = pytest.mark.parametrize("asked", [STOCHASTIC, KAHAN], ids=["stochastic", "kahan"])


@pytest.mark.parametrize("asked", [
    KAHAN, STOCHASTIC, STOCHASTIC | {"seed": 2**24 - 1}
], ids=["kahan", "seed_0", "last_seed"])  # fmt: skip
@halves
@widths
@families
def test_follows_the_reference(
    family: str, width: int, dtype: str, asked: dict[str, Any], backend: str
) -> None:
    """Stochastic rounding too is known to the bit: the random bits are."""
    twin = Twin(
        family, own_parameters(family, DTYPES[dtype], SHAPES), optim_bits=width, lr=0.01, **asked
    )
    for step in range(4):
        twin.step(step)


@ways
@families
def test_gradients_in_float32(family: str, asked: dict[str, Any], backend: str) -> None:
    params = own_parameters(family, torch.bfloat16, SMALL)
    for p in params:
        if hasattr(p, "grad_dtype"):  # newer torch asks for leave
            p.grad_dtype = None
    twin = Twin(family, params, **asked)
    for step in range(3):
        twin.step(step, [gradient(tuple(p.shape), torch.float32, 5 * step) for p in params])


@ways
def test_strided_parameters_count_elements_row_by_row(asked: dict[str, Any], backend: str) -> None:
    params = [
        p.detach().t().contiguous().t().requires_grad_() for p in made(torch.bfloat16, [(70, 65)])
    ]
    assert not params[0].is_contiguous()
    twin = Twin("adam", params, lr=0.01, **asked)
    for step in range(3):
        twin.step(step)


@halves
@pytest.mark.parametrize("asked", [{"optim_bits": 32}, {"optim_bits": 8}], ids=str)
def test_other_states_do_not_see_the_rounding(
    dtype: str, asked: dict[str, Any], backend: str
) -> None:
    """After one step only the parameters differ from storing to nearest."""
    plain = trained("adam", DTYPES[dtype], steps=1, lr=0.01, **asked)
    for way in (STOCHASTIC, KAHAN):
        other = trained("adam", DTYPES[dtype], steps=1, lr=0.01, **asked, **way)
        differing = {key for key in plain if plain[key] != other[key]}
        assert differing <= {"p0", "p1"}
        if way is KAHAN:
            assert without(other, "compensation") == plain
        else:
            assert differing == {"p0", "p1"}


@ways
def test_float32_parameters_are_stored_as_they_are(asked: dict[str, Any], backend: str) -> None:
    plain, other = [], []
    for found, options in ((plain, {}), (other, asked)):
        params = [*made(torch.float32, SMALL), *made(torch.bfloat16, [(64, 70)])]
        optimizer = build_optimizer("adamw", params, lr=0.01, **options)
        train(optimizer, range(3))
        found += [bits(p).tobytes() for p in params]
        assert "compensation" not in optimizer.state[params[0]]
    assert plain[:2] == other[:2]
    assert plain[2] != other[2]


def _tiny_steps(dtype: torch.dtype, steps: int, **asked: Any) -> Tensor:
    """Parameters of about 1 after steps of lr = 1e-4 each, a thirtieth of bfloat16's spacing."""
    p = torch.linspace(1, 1.9, 4096).to(dtype).requires_grad_()
    optimizer = build_optimizer("adam", [p], lr=1e-4, **asked)
    for _ in range(steps):
        p.grad = torch.ones_like(p)
        optimizer.step()
    return p.detach().double()


def test_tiny_steps_stall_to_nearest_and_follow_float32_otherwise(backend: str) -> None:
    start = torch.linspace(1, 1.9, 4096).to(torch.bfloat16).double()
    steps = 200
    exact = start - steps * 1e-4
    nearest = _tiny_steps(torch.bfloat16, steps)
    assert torch.equal(nearest, start)
    kahan = _tiny_steps(torch.bfloat16, steps, **KAHAN)
    assert float((kahan - exact).abs().max()) <= 2.0**-8 * 1.05  # half a spacing
    random = _tiny_steps(torch.bfloat16, steps, **STOCHASTIC)
    # Each of 200 steps rounds with a variance of at most 1e-4 * 2^-7.
    deviation = (steps * 1e-4 * 2.0**-7) ** 0.5
    assert abs(float((random - exact).mean())) < 5 * deviation / 4096**0.5
    assert float((random - exact).std()) < 1.2 * deviation
    assert not torch.equal(random, exact)


@ways
def test_numbers_that_are_not_finite(asked: dict[str, Any], backend: str) -> None:
    """NaN and infinities as to nearest; what overflows takes no NaN into the next step."""
    for dtype in (torch.bfloat16, torch.float16):
        p = torch.ones(300, dtype=dtype)
        p[0], p[1], p[2] = float("nan"), float("inf"), float("-inf")
        p[3] = torch.finfo(dtype).max
        p.requires_grad_()
        optimizer = build_optimizer("adamw", [p], lr=0.01, weight_decay=0.0, **asked)
        for _ in range(3):
            p.grad = torch.full_like(p, -1.0)
            p.grad[3] = -100.0
            optimizer.step()
        assert torch.isnan(p[0])
        assert p[1] == float("inf")
        assert p[2] == float("-inf")
        assert not torch.isnan(p[3:]).any()
        assert p[4] > 1


@halves
def test_compensation_starts_at_zero_and_holds_the_rest(dtype: str, backend: str) -> None:
    (p,) = made(DTYPES[dtype], [(20, 300)])
    exact = p.detach().clone().double()
    optimizer = build_optimizer("adam", [p], lr=1e-3, eps=0.0, **KAHAN)
    optimizer.init_states()
    rest = optimizer.state[p]["compensation"]
    assert rest.dtype == p.dtype
    assert rest.shape == p.shape
    assert not rest.any()
    for step in range(10):
        p.grad = torch.ones_like(p)
        optimizer.step()
        exact -= 1e-3
        kept = p.detach().double() + optimizer.state[p]["compensation"].double()
        torch.testing.assert_close(kept, exact, rtol=0, atol=1e-5 * (step + 1))
    assert optimizer.state[p]["compensation"].any()


def test_lamb_measures_the_compensated_parameter(backend: str) -> None:
    """All of it in the compensation: p is rounded to 0.5 and a quarter of a spacing is missing."""
    p = torch.full((20, 300), 0.5, dtype=torch.bfloat16).requires_grad_()
    twin = Twin("lamb", [p], weight_decay=0.0, lr=1e-3, **KAHAN)
    twin.optimizer.state[p]["compensation"].fill_(0.25)
    (update,) = twin.step(0)
    assert update.ratio > 0
    plain = Twin("lamb", [torch.full_like(p, 0.5).requires_grad_()], weight_decay=0.0, lr=1e-3)
    (other,) = plain.step(0)
    assert update.ratio == pytest.approx(1.5 * other.ratio, rel=1e-3)


@families
def test_nearest_is_the_default(family: str, backend: str) -> None:
    for width in (32, 8):
        default = trained(family, torch.bfloat16, optim_bits=width)
        asked = {"optim_bits": width, "param_rounding": "nearest", "seed": 0}
        assert trained(family, torch.bfloat16, **asked) == default


@pytest.mark.parametrize("asked", [KAHAN, STOCHASTIC | {"seed": 11}], ids=["kahan", "stochastic"])
@halves
@widths
def test_resumes_bit_for_bit(dtype: str, width: int, asked: dict[str, Any], backend: str) -> None:
    whole = assert_resumes("adamw", DTYPES[dtype], optim_bits=width, lr=0.01, **asked)
    assert ("p0.compensation" in whole) == (asked is KAHAN)


@ways
def test_same_bits_for_any_number_of_threads(asked: dict[str, Any], backend: str) -> None:
    results = []
    for threads in (1, 2):
        params = made(torch.bfloat16, [(100_001,), (70, 64)])
        optimizer = build_optimizer("lamb", params, lr=0.01, **asked)
        for step in range(2):
            torch.set_num_threads(1)
            for p in params:
                p.grad = gradient(tuple(p.shape), p.dtype, step)
            torch.set_num_threads(threads)
            optimizer.step()
        results.append(copies(params))
    assert not moved(*results)


@ways
@families
def test_refused_where_it_could_do_nothing(family: str, asked: dict[str, Any]) -> None:
    """Float32 parameters are stored as they are; 16-bit ones beside them are a reason to ask."""
    assert_refused("param_rounding", family, **asked)
    assert_refused("param_rounding", family, param_rounding="up")
    mixed = [torch.zeros(8, dtype=d).requires_grad_() for d in (torch.float32, torch.bfloat16)]
    build_optimizer(family, mixed, **asked)


def test_groups_of_float32_parameters_may_stand_beside_others() -> None:
    """Norms of a model in bfloat16, as a group by a rule, by hand, or added."""
    weight = torch.ones(4, 4, dtype=torch.bfloat16, requires_grad=True)
    norm, late = torch.ones(4, requires_grad=True), torch.ones(4, requires_grad=True)
    named = [("norm.weight", norm), ("fc.weight", weight)]
    rules = {"norms": {"match": "norm.*", "weight_decay": 0.0}}
    for optimizer in (
        build_optimizer("adamw", named, param_rounding="kahan", param_groups=rules),
        build_optimizer(
            "adamw", [{"params": [norm]}, {"params": [weight]}], param_rounding="kahan"
        ),
    ):
        optimizer.add_param_group({"params": [late]})
        assert [group["param_rounding"] for group in optimizer.param_groups] == ["kahan"] * 3
        for p in (norm, weight, late):
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert "compensation" in optimizer.state[weight]
        assert "compensation" not in optimizer.state[norm]
