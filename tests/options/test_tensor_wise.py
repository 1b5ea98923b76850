"""block_wise: false: one scale for the whole tensor, and nothing else differs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from optfactory import build_optimizer
from tests.families import ELEMENT_WISE, states_of
from tests.numerics.harness import DTYPES, Twin, gradient, own_parameters, parameters
from tests.options.tools import (
    SHAPES,
    assert_refused,
    assert_resumes,
    assert_threads_do_not_matter,
    element_wise,
    families,
    seen,
    trained,
)
from tests.reference import quantization as q
from tests.sampling import spread

WHOLE: dict[str, Any] = {"optim_bits": 8, "block_wise": False}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "decay": {"weight_decay": 0.1, "lr": 0.01},
    "everything_8bit": {"min_8bit_size": 1},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
@families
def test_follows_the_reference(family: str, variant: str, dtype: str, backend: str) -> None:
    twin = Twin(family, own_parameters(family, DTYPES[dtype], SHAPES), **WHOLE, **VARIANTS[variant])
    for step in range(4):
        twin.step(step)
    twin.count.check()


@pytest.mark.parametrize("mode", ["lamb", "clip"])
def test_the_trust_ratio_scales_the_update_alone(mode: str, backend: str) -> None:
    """Ratios far from 1, with decay: a ratio on the weights would show at once."""
    params = [(s * p).detach().requires_grad_() for s, p in zip(
        (30.0, 0.01), parameters(torch.float32, [(33, 300), (4097,)]), strict=True
    )]  # fmt: skip
    twin = Twin("lamb", params, trust_ratio=mode, weight_decay=0.1, lr=1e-2, **WHOLE)
    for step in range(3):
        ratios = [update.ratio for update in twin.step(step)]
    assert ratios[1] < 0.5


@pytest.mark.parametrize("shape", [(20_003,), (101, 99), (4099, 2)])
def test_the_scale_is_the_maximum_of_all_elements(shape: tuple[int, ...], backend: str) -> None:
    """Wherever it stands, also behind the last multiple of four."""
    for place in (0, 5000, -1):
        g = 0.01 * gradient(shape, torch.float32, 3)
        g.view(-1)[place] = 7.0
        p = torch.zeros(shape, requires_grad=True)
        p.grad = g
        optimizer = build_optimizer("adam", [p], betas=(0.0, 0.0), **WHOLE)
        optimizer.step()
        state = optimizer.state[p]
        assert state["exp_avg_absmax"].tolist() == [7.0]
        assert state["exp_avg_sq_absmax"].tolist() == [49.0]
        assert state["exp_avg_q8"].view(-1)[place] == 255


@pytest.mark.parametrize("extreme", [1.0, -1.0])
def test_a_step_stores_the_exact_codes(extreme: float, backend: str) -> None:
    """With betas of 0 the moments are g and fl32(g^2): every code is known to the bit."""
    rng = np.random.default_rng(0)
    g = (10 ** rng.uniform(-9, 0, (300, 333)) * rng.choice([-1, 1], (300, 333))).astype(np.float32)
    g[250, 7] = extreme
    p = torch.zeros(g.shape, requires_grad=True)
    p.grad = torch.from_numpy(g.copy())
    optimizer = build_optimizer("adam", [p], betas=(0.0, 0.0), **WHOLE)
    optimizer.step()
    for name, moment, rule in (
        ("exp_avg", g, q.SIGNED_CODEC),
        ("exp_avg_sq", g * g, q.UNSIGNED_CODEC),
    ):
        codes, scales = (optimizer.state[p][f"{name}_{kind}"].numpy() for kind in ("q8", "absmax"))
        q.assert_encodes(codes.reshape(-1), scales, moment.reshape(-1), rule, g.size)


@families
def test_a_tensor_of_one_block_is_the_same_both_ways(family: str, backend: str) -> None:
    shapes: list[tuple[int, ...]] = [(256,), (1, 200)]
    asked = {"optim_bits": 8, "min_8bit_size": 1}
    blocks = trained(family, shapes=shapes, **asked)
    assert trained(family, shapes=shapes, block_wise=False, **asked) == blocks


@element_wise
def test_rows_too_short_for_block_scales_are_quantized(family: str, backend: str) -> None:
    found = trained(family, shapes=[(2100, 2), (4096, 1)], **WHOLE)
    for state in states_of(family):
        assert len(found[f"p0.{state.name}_q8"]) == 4200
        assert len(found[f"p1.{state.name}_absmax"]) == 4


@families
def test_true_is_the_default(family: str, backend: str) -> None:
    default = trained(family, optim_bits=8)
    assert trained(family, optim_bits=8, block_wise=True) == default
    assert trained(family, **WHOLE) != default


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@families
def test_a_bad_element_does_not_destroy_the_scale(family: str, bad: float, backend: str) -> None:
    twin = Twin(family, own_parameters(family, torch.float32, [(20, 300)]), **WHOLE)
    for step in range(3):
        g = gradient((20, 300), torch.float32, step)
        if step == 1:
            g[3, 5] = bad
        twin.step(step, [g])
    state = twin.optimizer.state[twin.params[0]]
    for name in twin.states:
        assert torch.isfinite(state[f"{name}_absmax"]).all()


def test_same_bits_for_any_number_of_threads(backend: str) -> None:
    for family in spread(ELEMENT_WISE, 4):  # products of matrices are torch's
        assert_threads_do_not_matter(family, [(150_001,), (70, 64)], **WHOLE)


def test_a_transposed_parameter_has_the_same_state(backend: str) -> None:
    runs = []
    for transposed in (False, True):
        (p,) = parameters(torch.float32, [(100, 70)])
        if transposed:
            p = p.detach().t().contiguous().t().requires_grad_()
        optimizer = build_optimizer("adamw", [p], **WHOLE)
        for step in range(3):
            p.grad = gradient((100, 70), torch.float32, step)
            optimizer.step()
        runs.append(seen(optimizer))
    assert runs[0] == runs[1]


def test_paged_state_is_the_same(backend: str) -> None:
    name = "paged_adam8bit"
    resident, paged = (
        trained(n, shapes=[(320, 400)], steps=2, block_wise=False) for n in ("adam8bit", name)
    )
    assert resident == paged


@families
def test_resumes_bit_for_bit(family: str, backend: str) -> None:
    whole = assert_resumes(family, **WHOLE)
    for state in states_of(family):
        assert len(whole[f"p0.{state.name}_absmax"]) == 4


@families
def test_refused_where_it_could_do_nothing(family: str) -> None:
    assert_refused("block_wise", family, block_wise=False)
    assert_refused("block_wise", f"{family}32bit", block_wise=False)
    assert_refused("block_wise|block_size", family, block_size=128, **WHOLE)
