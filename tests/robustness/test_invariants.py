"""What holds for all numbers, whatever the reference says."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from optfactory import Optimizer2State, build_optimizer
from tests.families import states_of
from tests.numerics.harness import ENDS, placed
from tests.reference.quantization import SIGNED_CODEC, SMALL, SYMMETRIC_CODEC, grid, scales_shape
from tests.robustness.harness import (
    ADAMS,
    NAMES,
    Numbers,
    Shape,
    dtypes,
    examples,
    numbers,
    shapes,
)

seeds = st.integers(0, 2**32 - 1)
wide_shapes = shapes.filter(lambda shape: min(grid(shape)) > 0 and grid(shape)[1] >= 64)


# ---- Q(D(q)) = q -----------------------------------------------------------------------------


def _codes(rng: np.random.Generator, shape: Shape, extremes: list[int]) -> Tensor:
    """Random codes; each block has one of the extremes somewhere."""
    rows, columns = grid(shape)
    codes = rng.integers(0, 256, (rows, columns), dtype=np.uint8)
    for begin in range(0, columns, 256):
        width = min(256, columns - begin)
        places = begin + rng.integers(0, width, rows)
        codes[np.arange(rows), places] = rng.choice(extremes, rows)
    return torch.from_numpy(codes.reshape(shape))


def _scales(rng: np.random.Generator, shape: Shape) -> Tensor:
    """Scales under which no value of a map is subnormal or overflows."""
    exponents = rng.uniform(-30, 30) + rng.uniform(-6, 6, scales_shape(shape))
    return torch.from_numpy((10.0**exponents).astype(np.float32))


def _ulps(one: Tensor, other: Tensor) -> int:
    distance = one.view(torch.int32) - other.view(torch.int32)
    return int(distance.abs().max())


@pytest.mark.parametrize("signed_map", ["dynamic", "symmetric"])
@given(shape=wide_shapes, seed=seeds)
@examples(40)
def test_codes_that_are_decoded_and_encoded_stay(signed_map: str, shape: Shape, seed: int) -> None:
    """A step that skips all elements decodes and encodes them."""
    rng = np.random.default_rng(seed)
    p = torch.from_numpy(rng.standard_normal(shape)).float().requires_grad_()
    asked: dict[str, Any] = {"min_8bit_size": 1, "skip_zeros": True, "signed_map": signed_map}
    optimizer = build_optimizer("adam8bit", [p], **asked)
    optimizer.init_states()
    state, values = optimizer.state[p], p.detach().clone()
    for key, extremes in (("exp_avg", [0, 255]), ("exp_avg_sq", [255])):
        state[f"{key}_q8"].copy_(_codes(rng, shape, extremes))
        state[f"{key}_absmax"].copy_(_scales(rng, shape))
    before = {key: tensor.clone() for key, tensor in state.items()}
    p.grad = torch.zeros(shape)
    optimizer.step()
    assert torch.equal(p, values)
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(state[f"{key}_q8"], before[f"{key}_q8"])
        # The map has no -1, so that a scale which a negative number decides is computed anew.
        allowed = 1 if key == "exp_avg" and signed_map == "dynamic" else 0
        assert _ulps(state[f"{key}_absmax"], before[f"{key}_absmax"]) <= allowed


def test_the_extremes_are_codes_of_the_maps() -> None:
    assert SIGNED_CODEC.values[255] == SYMMETRIC_CODEC.values[255] == 1
    assert SYMMETRIC_CODEC.values[0] == -1 < SIGNED_CODEC.values[0]


# ---- powers of two ---------------------------------------------------------------------------


def _trained(name: str, p: Tensor, grads: list[Tensor], **asked: Any) -> Optimizer2State:
    p.requires_grad_()
    optimizer = build_optimizer(name, [p], min_8bit_size=1, **asked)
    for g in grads:
        p.grad = g
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("name", ADAMS)
@given(
    shape=shapes,
    values=numbers("normal"),
    recipes=st.tuples(*[numbers("normal", "all equal", "negative extreme", "zero")] * 3),
    exponent=st.integers(-30, 30),
    halves=st.booleans(),
)
@examples(6)
def test_gradients_times_a_power_of_two_change_nothing_but_the_scale(
    name: str,
    shape: Shape,
    values: Numbers,
    recipes: tuple[Numbers, ...],
    exponent: int,
    halves: bool,
) -> None:
    """Adam's direction has no unit if eps takes that of the gradient."""
    dtype, factor = torch.bfloat16 if halves else torch.float32, 2.0**exponent
    grads = [recipe.tensor(shape, dtype) for recipe in recipes]
    p, q = (values.tensor(shape, dtype) for _ in range(2))
    asked = {"lr": 0.01, "weight_decay": 0.0}
    one = _trained(name, p, grads, eps=1e-3, **asked).state[p]
    other = _trained(name, q, [g * factor for g in grads], eps=1e-3 * factor, **asked).state[q]
    assert torch.equal(p, q)
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        power = 2 if "sq" in key else 1
        scaled = tensor * factor**power if key.startswith("exp") else tensor
        assert torch.equal(scaled if tensor.is_floating_point() else tensor, other[key]), key


# ---- nothing to do ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@given(
    shape=shapes,
    dtype=dtypes,
    values=numbers("normal", "decades", "denormal", "zero"),
    recipes=st.tuples(numbers(), numbers(), numbers()),
    share=st.sampled_from([0.01, 0.5, 0.99, 1.0]),
    seed=seeds,
)
@examples(8)
def test_elements_that_never_had_a_gradient_never_move(
    name: str,
    shape: Shape,
    dtype: torch.dtype,
    values: Numbers,
    recipes: tuple[Numbers, ...],
    share: float,
    seed: int,
) -> None:
    """Whatever happens to the others in their block."""
    rest = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share
    grads = [recipe.tensor(shape, dtype).masked_fill(rest, 0.0) for recipe in recipes]
    p = values.tensor(shape, dtype)
    before = p[rest].clone()
    optimizer = _trained(name, p, grads, lr=0.1, weight_decay=0.0)
    assert torch.equal(p.detach()[rest], before)
    state = optimizer.state[p]
    for kept in states_of(name):
        if kept.name in state:
            assert not state[kept.name][rest].any()
        else:
            width = next(end for end in ENDS if name.endswith(end))
            codec = SMALL[width][kept.signed][0] if width in SMALL else None
            zero = codec.zero_code if codec else SIGNED_CODEC.zero_code if kept.signed else 0
            codes = placed(state, kept.name, width, kept.signed, shape).codes
            assert (codes[rest.numpy()] == zero).all()


# NAdam's first momentum is looked ahead with the next one's share.
@pytest.mark.parametrize("name", [name for name in ADAMS if "nadam" not in name])
@given(
    shape=shapes,
    dtype=dtypes,
    values=numbers("normal", "zero"),
    recipe=numbers(),
)
@examples(8)
def test_a_first_step_of_adam_is_at_most_lr(
    name: str, shape: Shape, dtype: torch.dtype, values: Numbers, recipe: Numbers
) -> None:
    """m / sqrt(v) is the gradient's sign, whatever its size; a LAMB step has the ratio's norm."""
    p, g = values.tensor(shape, dtype), recipe.tensor(shape, dtype)
    before = p.double()
    optimizer = _trained(name, p, [g], lr=0.125, weight_decay=0.0)
    moved = (p.detach().double() - before).abs()
    limit = 0.125
    if optimizer.config.family == "lamb":
        length = float(before.norm())
        limit *= length if length > 0 else 1.0
    rounding = torch.finfo(dtype).eps * before.abs().max().item() if math.prod(shape) else 0.0
    assert moved.isfinite().all()
    assert (moved <= limit * (1 + 1e-5) + rounding).all()
