"""signed_map and second_moment_floor: which code a state takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from optfactory import build_optimizer
from optfactory.state import quantmap
from tests.families import acts_on, states_of
from tests.numerics.harness import DTYPES, Twin, gradient, own_parameters, quantized
from tests.options.tools import (
    FAMILIES,
    SHAPES,
    assert_refused,
    assert_resumes,
    families,
    trained,
)
from tests.reference import quantization as q
from tests.reference.tables import SYMMETRIC

MIRRORED: dict[str, Any] = {"optim_bits": 8, "signed_map": "symmetric"}
FLOORLESS: dict[str, Any] = {"optim_bits": 8, "second_moment_floor": False}
MAPPED = [family for family in FAMILIES if acts_on(family, "signed_map")]
FLOORED = [family for family in FAMILIES if acts_on(family, "second_moment_floor")]
both = pytest.mark.parametrize(
    ("family", "asked"),
    [
        *(pytest.param(family, MIRRORED, id=f"{family}-symmetric") for family in MAPPED),
        *(pytest.param(family, FLOORLESS, id=f"{family}-no_floor") for family in FLOORED),
    ],
)


@pytest.mark.parametrize("dtype", DTYPES)
@both
def test_follows_the_reference(
    family: str, asked: dict[str, Any], dtype: str, backend: str
) -> None:
    twin = Twin(family, own_parameters(family, DTYPES[dtype], SHAPES), **asked, weight_decay=0.1)
    for step in range(4):
        twin.step(step)
    twin.count.check()


def test_the_table_of_the_symmetric_map() -> None:
    values = np.array(quantmap.map_for(True, kind="symmetric").values, dtype=np.float32)
    assert values.tobytes() == SYMMETRIC.tobytes()
    assert quantmap.map_for(False, kind="symmetric") is quantmap.UNSIGNED


def _rows(rule: q.Codec) -> np.ndarray:
    """Rows of scale 1 with the map, its mid-points, their neighbours and random values."""
    mid, infinity = rule.midpoints.astype(np.float32), np.float32(np.inf)
    rng = np.random.default_rng(0)
    spread = 10 ** rng.uniform(-9, 0, 20_000) * rng.choice([-1, 1], 20_000)
    values = np.concatenate([
        rule.values, mid, np.nextafter(mid, infinity), np.nextafter(mid, -infinity), spread,
    ]).astype(np.float32)  # fmt: skip
    rows = np.ones((-(-values.size // 255), 256), dtype=np.float32)
    rows[:, 1:].flat[: values.size] = np.clip(values, rule.values[0], 1)
    return rows


@pytest.mark.parametrize("lift", [1.0, 2.0**-20, 0.7])
@pytest.mark.parametrize("option", ["symmetric", "no_floor"])
def test_a_step_stores_the_exact_codes(option: str, lift: float, backend: str) -> None:
    """With betas of 0 the moments are g and fl32(g^2): every code is known to the bit."""
    symmetric = option == "symmetric"
    rules = {
        "exp_avg": q.SYMMETRIC_CODEC if symmetric else q.SIGNED_CODEC,
        "exp_avg_sq": q.UNSIGNED_CODEC if symmetric else q.UNFLOORED_CODEC,
    }
    rows = _rows(rules["exp_avg"]) if symmetric else np.sqrt(_rows(rules["exp_avg_sq"]))
    g = (rows * np.float32(lift)).astype(np.float32)
    g[::2] *= -1
    p = torch.zeros(g.shape, requires_grad=True)
    p.grad = torch.from_numpy(g.copy())
    asked = MIRRORED if symmetric else FLOORLESS
    optimizer = build_optimizer("adam", [p], betas=(0.0, 0.0), **asked)
    optimizer.step()
    for name, moment in (("exp_avg", g), ("exp_avg_sq", g * g)):
        stored = (optimizer.state[p][f"{name}_{kind}"].numpy() for kind in ("q8", "absmax"))
        q.assert_encodes(*stored, moment, rules[name])


@pytest.mark.parametrize("beta", [0.9, 0.99])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_constant_gradient_reaches_itself(sign: float, beta: float, backend: str) -> None:
    """The symmetric map holds -1 itself: max |x| is the scale, and the code is the last one."""
    p = torch.zeros(20, 256, requires_grad=True)
    optimizer = build_optimizer("adam", [p], betas=(beta, 0.999), **MIRRORED)
    for _ in range(int(20 / (1 - beta))):
        p.grad = torch.full_like(p, sign)
        optimizer.step()
    state = optimizer.state[p]
    assert (state["exp_avg_q8"] == (255 if sign > 0 else 0)).all()
    np.testing.assert_allclose(state["exp_avg_absmax"].numpy(), 1.0, rtol=1e-5)


def test_mirrored_gradients_give_mirrored_trajectories(backend: str) -> None:
    """All codes have a partner but that of the smallest number, which weighs 5.5e-7."""
    params = [torch.zeros(20, 300, requires_grad=True) for _ in range(2)]
    optimizer = build_optimizer("adam", params, **MIRRORED)
    for step in range(20):
        g = gradient((20, 300), torch.float32, step)
        params[0].grad, params[1].grad = g, -g
        optimizer.step()
    torch.testing.assert_close(params[0], -params[1], rtol=1e-3, atol=2e-5)
    one, other = (optimizer.state[p] for p in params)
    torch.testing.assert_close(one["exp_avg_absmax"], other["exp_avg_absmax"], rtol=1e-5, atol=0)
    assert torch.equal(one["exp_avg_sq_q8"], other["exp_avg_sq_q8"])


@pytest.mark.parametrize("family", MAPPED)
def test_the_map_concerns_quantized_signed_state_alone(family: str, backend: str) -> None:
    """After one step from zero the second moments and 32-bit states are the same bits."""
    shapes: list[tuple[int, ...]] = [(20, 300), (100,)]
    asked = {"optim_bits": 8}
    dynamic = trained(family, shapes=shapes, steps=1, **asked)
    symmetric = trained(family, shapes=shapes, steps=1, **MIRRORED)
    differing = {key for key in dynamic if dynamic[key] != symmetric[key]}
    signed = [state.name for state in states_of(family) if state.signed]
    assert differing == {f"p0.{name}_{part}" for name in signed for part in ("q8", "absmax")}


@pytest.mark.parametrize("family", FLOORED)
def test_the_floor_concerns_the_second_moment_alone(family: str, backend: str) -> None:
    dynamic, floorless = (
        trained(family, steps=1, shapes=[(20, 300), (100,)], **asked)
        for asked in ({"optim_bits": 8}, FLOORLESS)
    )
    differing = {key for key in dynamic if dynamic[key] != floorless[key]}
    assert differing == {f"p0.{state.name}_q8" for state in states_of(family) if not state.signed}
    for key in differing:
        codes = [np.frombuffer(run[key], np.uint8) for run in (dynamic, floorless)]
        changed = codes[0] != codes[1]
        assert set(codes[0][changed]) == {1}
        assert set(codes[1][changed]) == {0}


def _worst_step(r: float, asked: dict[str, Any]) -> float:
    """The longest step of any element, in learning rates, in numerics' scenario of giant steps."""
    p = torch.zeros(4, 256, requires_grad=True)
    lr, worst = 1e-3, 0.0
    optimizer = build_optimizer("adam8bit", [p], lr=lr, min_8bit_size=1, **asked)
    for step in range(150):
        g = torch.full_like(p, r if step % 10 else 0.0)
        g[:, 0] = 1.0
        p.grad = g
        before = p.detach().clone()
        optimizer.step()
        worst = max(worst, float((p.detach() - before).abs().max()) / lr)
    return worst


@pytest.mark.parametrize(("r", "giant"), [(3e-4, 1e3), (1e-4, 1e3), (1e-3, 0.5)])
def test_the_floor_prevents_giant_steps(r: float, giant: float, backend: str) -> None:
    """Where the root of the second moment underflows and the first moment does not."""
    assert _worst_step(r, {}) < 3.2
    without = _worst_step(r, {"second_moment_floor": False})
    assert without > giant
    assert giant > 1 or without < 3.2


@families
def test_off_by_default(family: str, backend: str) -> None:
    default = trained(family, optim_bits=8)
    assert trained(family, optim_bits=8, signed_map="dynamic") == default
    assert trained(family, optim_bits=8, second_moment_floor=True) == default


def test_zero_stays_at_its_code(backend: str) -> None:
    """Fresh state, zero gradients and blocks of zeros decode to zero."""
    for asked in (MIRRORED, FLOORLESS):
        p = torch.ones(20, 300, requires_grad=True)
        optimizer = build_optimizer("adam", [p], **asked)
        optimizer.init_states()
        for _ in range(3):
            m, v = (quantized(optimizer.state[p], name) for name in ("exp_avg", "exp_avg_sq"))
            assert (m.codes == 127).all()
            assert (v.codes == 0).all()
            p.grad = torch.zeros_like(p)
            optimizer.step()
        assert (p == 1).all()


@both
def test_resumes_bit_for_bit(family: str, asked: dict[str, Any], backend: str) -> None:
    assert_resumes(family, **asked)


@families
def test_refused_where_it_could_do_nothing(family: str) -> None:
    assert_refused("signed_map", family, signed_map="symmetric")
    assert_refused("signed_map", f"{family}32bit", signed_map="symmetric")
    assert_refused("signed_map", family, optim_bits=8, signed_map="linear")
    assert_refused("second_moment_floor", family, second_moment_floor=False)
    assert_refused("second_moment_floor", f"paged_{family}32bit", second_moment_floor=False)
