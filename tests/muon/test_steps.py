"""Steps against torch.optim.Muon and against Muon written out in float64."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from tests.conftest import on_cpus
from tests.muon.harness import (
    MUON,
    PlainMuon,
    assert_follows,
    built,
    give,
    matrices,
    plain_settings,
    train,
)
from tests.numerics.harness import bits
from tests.reference.rounding import stochastic

CUBIC = (1.5, -0.5, 0.0)
SETTINGS = [
    {"adjust_lr": scaling, "nesterov": nesterov, "ns_coefficients": coefficients}
    for scaling, nesterov, coefficients in product(
        ("match_rms_adamw", "original"), (True, False), ("muon", CUBIC)
    )
]


def followed(asked: dict[str, Any], steps: int = 4, bound: float = 1e-5, **plain: Any) -> None:
    """Train beside the plain one."""
    asked = {"lr": 0.02, **asked}
    params = matrices()
    starts = [p.detach().clone() for p in params]
    others = [PlainMuon(p, **plain_settings({**asked, **plain})) for p in params]
    optimizer = built(params, **asked)
    for step in range(steps):
        give(params, step)
        for p, other in zip(params, others, strict=True):
            assert p.grad is not None
            other.step(-p.grad if asked.get("maximize") else p.grad)
        optimizer.step()
        for p, other, start in zip(params, others, starts, strict=True):
            assert_follows(p, other, start, bound)


@on_cpus
@pytest.mark.parametrize("asked", SETTINGS, ids=str)
def test_steps_are_those_of_float64(asked: dict[str, Any], backend: str) -> None:
    triple = MUON if asked["ns_coefficients"] == "muon" else CUBIC
    followed(asked, triples=(triple,) * 5)


@on_cpus
@pytest.mark.parametrize(
    "asked",
    [
        {"maximize": True, "momentum": 0.5},
        {"momentum": 0.0, "weight_decay": 0.0},
        {"eps": 1e3, "lr": 10.0},
        {"ns_steps": 2, "ns_coefficients": [CUBIC, MUON]},
    ],
    ids=str,
)
def test_other_settings_are_those_of_float64(asked: dict[str, Any], backend: str) -> None:
    steps = asked.get("ns_coefficients", [MUON] * 5)
    followed(asked, triples=steps)


@pytest.mark.parametrize("asked", SETTINGS, ids=str)
def test_steps_are_those_of_torch_in_its_bfloat16(asked: dict[str, Any]) -> None:
    """Its directions are off by some percent themselves, ours on CPUs are not."""
    ours, theirs = matrices(), matrices()
    coefficients = MUON if asked["ns_coefficients"] == "muon" else CUBIC
    asked = {"lr": 0.02, **asked}
    peer = torch.optim.Muon(
        theirs,
        lr=0.02,
        nesterov=asked["nesterov"],
        adjust_lr_fn=asked["adjust_lr"],
        ns_coefficients=coefficients,
    )
    starts = [p.detach().clone() for p in ours]
    optimizer = built(ours, **asked)
    for step in range(5):
        train(optimizer, ours, range(step, step + 1))
        train(peer, theirs, range(step, step + 1))
        for p, q, start in zip(ours, theirs, starts, strict=True):
            torch.testing.assert_close(
                optimizer.state[p]["momentum_buffer"], peer.state[q]["momentum_buffer"],
                rtol=1e-5, atol=1e-7,
            )  # fmt: skip
            apart = (p - q).detach().norm() / (q.detach() - start).norm()
            assert float(apart) < 0.05


@on_cpus
def test_decay_is_left_out_where_the_direction_opposes_the_parameter(backend: str) -> None:
    """By the sign of the direction that was made of the matrix, not of the momentum."""
    asked = {"cautious_weight_decay": True, "weight_decay": 0.5, "lr": 0.1}
    params = matrices([(48, 80)])
    (start,) = [p.detach().clone() for p in params]
    plain = PlainMuon(start, lr=0.1, weight_decay=0.5, cautious=True)
    optimizer = built(params, **asked)
    for step in range(3):
        give(params, step)
        assert params[0].grad is not None
        plain.step(params[0].grad)
        optimizer.step()
    assert_follows(params[0], plain, start, 1e-4)


@on_cpus
def test_rounded_products_come_near(backend: str) -> None:
    followed({"ns_dtype": "bfloat16"}, bound=0.05)


# ---- parameters that are several matrices ------------------------------------------------------

SPLIT = {"split": 3}


def _parts(shape: tuple[int, ...], asked: dict[str, Any]) -> list[tuple[slice | int, ...]]:
    if "split" in asked:
        rows = shape[-2] // 3
        return [(..., slice(n * rows, (n + 1) * rows), slice(None)) for n in range(3)]  # type: ignore[misc]
    return [(n,) for n in range(shape[0])]


@on_cpus
@pytest.mark.parametrize(
    ("shape", "asked"), [((144, 48), SPLIT), ((3, 40, 64), {}), ((5, 64, 40), {})], ids=str
)
def test_blocks_and_stacks_are_separate_matrices(
    shape: tuple[int, ...], asked: dict[str, Any], backend: str
) -> None:
    """To the bit: with states whose blocks lie within rows."""
    whole = matrices([shape])
    parts = [whole[0].detach()[place].clone().requires_grad_() for place in _parts(shape, asked)]
    one, other = built(whole, lr=0.1, **asked), built(parts, lr=0.1)
    for step in range(3):
        give(whole, step)
        assert whole[0].grad is not None
        for p, place in zip(parts, _parts(shape, asked), strict=True):
            p.grad = whole[0].grad[place].clone()
        one.step()
        other.step()
    for p, place in zip(parts, _parts(shape, asked), strict=True):
        assert torch.equal(whole[0][place], p)


@on_cpus
def test_kernels_of_convolutions_are_one_matrix_on_request(backend: str) -> None:
    (kernel,) = matrices([(32, 8, 3, 3)])
    flat = kernel.detach().reshape(32, 72).clone().requires_grad_()
    one, other = built([kernel], flatten=True, lr=0.1), built([flat], lr=0.1)
    for step in range(3):
        give([kernel], step)
        assert kernel.grad is not None
        flat.grad = kernel.grad.reshape(32, 72).clone()
        one.step()
        other.step()
    assert torch.equal(kernel.reshape(32, 72), flat)
    assert {group["optimizer"] for group in one.param_groups} == {"muon"}


# ---- parameters and states of other kinds ------------------------------------------------------


@on_cpus
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_parameters_are_rounded_once(
    dtype: torch.dtype, rounding: str, backend: str
) -> None:
    more = {"seed": 3} if rounding == "stochastic" else {}
    params = matrices([(48, 80)], dtype)
    start = params[0].detach().clone()
    plain = PlainMuon(start, lr=0.02)
    optimizer = built(params, lr=0.02, param_rounding=rounding, **more)
    give(params, 0)
    assert params[0].grad is not None
    plain.step(params[0].grad)
    optimizer.step()
    if rounding == "stochastic":
        ones = [stochastic(plain.p.numpy(), word, dtype) for word in (0, 2**32 - 1)]
        low, high = (torch.from_numpy(x).to(dtype) for x in ones)
        near = (params[0].double() - plain.p).abs() <= (high.double() - low.double()).abs() + 1e-5
        assert near.all()
        assert (params[0] != plain.p.to(dtype)).float().mean() > 0.1
        return
    off = (params[0].double() - plain.p).abs()
    assert (off <= 0.51 * torch.finfo(dtype).eps * plain.p.abs() + 1e-6).all()
    if rounding == "kahan":
        rest = optimizer.state[params[0]]["compensation"].double()
        assert float((params[0].detach().double() + rest - plain.p).abs().max()) < 1e-5


@on_cpus
def test_momentum_of_8_bits_is_near_that_of_32(backend: str) -> None:
    """The direction is made of the momentum before it is rounded: the first step is the same."""
    shapes = [(96, 128), (128, 96)]
    wide, narrow = matrices(shapes), matrices(shapes)
    optimizers = built(wide, lr=0.02), built(narrow, "muon8bit", lr=0.02)
    for step in range(6):
        for params, optimizer in zip((wide, narrow), optimizers, strict=True):
            train(optimizer, params, range(step, step + 1))
        for p, q, start in zip(wide, narrow, matrices(shapes), strict=True):
            assert "momentum_buffer_q8" in optimizers[1].state[q]
            apart = (p - q).detach().norm() / (p - start).detach().norm()
            assert float(apart) <= (0.0 if step == 0 else 0.2)


@on_cpus
@pytest.mark.parametrize("width", ["32bit", "8bit"])
def test_clipped_gradients_are_those_times_a_factor(width: str, backend: str) -> None:
    """A gradient clipped to the last one's norm enters the momentum by that factor."""
    asked = {"lr": 0.02, "percentile_clipping": 0, "state_rounding": "nearest"}
    if width == "32bit":
        del asked["state_rounding"]
    one, other = matrices([(96, 128)]), matrices([(96, 128)])
    clipped = built(one, f"muon{width}", **asked)
    plain = built(other, f"muon{width}", **{**asked, "percentile_clipping": 100})
    for step, size in enumerate((1.0, 16.0, 4.0)):
        give(other, 0)
        assert other[0].grad is not None
        one[0].grad = size * other[0].grad
        clipped.step()
        plain.step()
        assert (one[0] - other[0]).abs().max() < 1e-5, step
    assert "gnorm_vec" in clipped.state[one[0]]


def test_the_direction_does_not_touch_gradients(backend: str) -> None:
    params = matrices()
    optimizer = built(params)
    give(params, 0)
    before = [bits(p.grad) for p in params if p.grad is not None]
    optimizer.step()
    after = [bits(p.grad) for p in params if p.grad is not None]
    assert all((one == two).all() for one, two in zip(before, after, strict=True))
