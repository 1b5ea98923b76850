"""NaN, infinities, overflow and subnormal numbers: torch's results at 32 bits, contained at 8."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from optfactory import build_optimizer
from optfactory import families as families_module
from optfactory.extend import OptimizerConfig, StateSpec, UpdateRule, register
from tests.families import ELEMENT_WISE, FAMILIES, has_adams_moments, has_ratio, states_of
from tests.numerics.harness import Twin, gradient, parameters, quantized
from tests.reference.quantization import SIGNED_CODEC, UNSIGNED_CODEC, decode32

PEERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
BAD = {"nan": float("nan"), "inf": float("inf"), "minus_inf": float("-inf")}
SHAPE = (20, 300)

families = pytest.mark.parametrize("family", FAMILIES)
element_wise = pytest.mark.parametrize("family", ELEMENT_WISE)
widths = pytest.mark.parametrize("width", [32, 8])


def _grads(step: int, bad: float | None = None) -> list[torch.Tensor]:
    g = gradient(SHAPE, torch.float32, step)
    if bad is not None:
        g[3, 5] = bad
        g[7, 299] = bad  # in a row's short last block
    return [g]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("family", PEERS)
def test_32_bits_propagate_as_torch_does(family: str, bad: str, backend: str) -> None:
    ours = parameters(torch.float32, [SHAPE])
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    optimizers = (build_optimizer(f"{family}32bit", ours), PEERS[family](theirs))
    for step in range(4):
        for side in (ours, theirs):
            side[0].grad = _grads(step, BAD[bad] if step == 1 else None)[0]
        for optimizer in optimizers:
            optimizer.step()
    assert int(torch.isnan(theirs[0]).sum()) == 2
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=1e-8, equal_nan=True)
    for key in ("exp_avg", "exp_avg_sq"):
        mine, peer = optimizers[0].state[ours[0]][key], optimizers[1].state[theirs[0]][key]
        # torch's form m + (1 - beta1) (g - m) turns an infinite m into NaN at the next step.
        kept = torch.isfinite(peer)
        assert torch.equal(kept, torch.isfinite(mine))
        torch.testing.assert_close(mine[kept], peer[kept], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("family", PEERS)
def test_an_infinite_parameter_stays_infinite_as_in_torch(family: str, backend: str) -> None:
    ours = parameters(torch.float32, [SHAPE])
    with torch.no_grad():
        ours[0][2, 2] = float("inf")
        ours[0][2, 3] = float("-inf")
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    settings = {"weight_decay": 0.0}
    for optimizer, side in (
        (build_optimizer(family, ours, **settings), ours),
        (PEERS[family](theirs, **settings), theirs),
    ):
        side[0].grad = _grads(0)[0]
        optimizer.step()
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=1e-8, equal_nan=True)


@pytest.mark.parametrize("bad", BAD)
@element_wise
def test_8_bits_contain_a_bad_element(family: str, bad: str, backend: str) -> None:
    """The block's scale and the other codes are those of a run in which nothing is wrong."""
    runs = []
    for value in (None, BAD[bad]):
        (p,) = parameters(torch.float32, [SHAPE])
        optimizer = build_optimizer(f"{family}8bit", [p])
        for step in range(3):
            grads = _grads(step, value if step == 1 else None)
            for row, column in ((3, 5), (7, 299)):
                if value is None:
                    grads[0][row, column] = 0.0
            p.grad = grads[0]
            optimizer.step()
            if step == 1:
                states = {k: v.clone() for k, v in optimizer.state[p].items()}
        runs.append((p.detach().clone(), states))
    (clean_p, clean), (p, hurt) = runs
    other = torch.ones(SHAPE, dtype=torch.bool)
    other[3, 5] = other[7, 299] = False
    for name, signed in ((state.name, state.signed) for state in states_of(family)):
        codes = hurt[f"{name}_q8"]
        assert torch.isfinite(hurt[f"{name}_absmax"]).all()
        assert codes[3, 5] == codes[7, 299] == (127 if signed else 0)
        if not has_ratio(family):  # LAMB's parameters differ by the ratio, Adam's states do not
            assert torch.equal(codes[other], clean[f"{name}_q8"][other])
            assert torch.equal(hurt[f"{name}_absmax"], clean[f"{name}_absmax"])
    assert torch.isfinite(p[other]).all()
    if not has_ratio(family):
        assert torch.equal(p[other], clean_p[other])
    # A sign of infinity is a number, and so is what ADOPT clips it to.
    if has_adams_moments(family) and family != "adopt":
        assert torch.isnan(p[3, 5])


@pytest.mark.parametrize("bad", BAD)
@widths
@families
def test_a_bad_element_follows_the_formula(family: str, width: int, bad: str, backend: str) -> None:
    twin = Twin(family, parameters(torch.float32, [SHAPE]), optim_bits=width)
    for step in range(3):
        twin.step(step, _grads(step, BAD[bad] if step == 1 else None))


@pytest.mark.parametrize("size", [1e18, 1e20, 3e21, 3e38])
@widths
@families
def test_huge_gradients(family: str, width: int, size: float, backend: str) -> None:
    """At 3e21 the square overflows: v is infinite, the element does not move, p stays finite."""
    twin = Twin(family, parameters(torch.float32, [SHAPE]), optim_bits=width)
    for step in range(3):
        g = gradient(SHAPE, torch.float32, step)
        if step == 1:
            g[4, 8] = size
            g[4, 9] = -size
        twin.step(step, [g])
    assert torch.isfinite(twin.params[0]).all()
    if width == 8:
        for name in twin.states:
            assert torch.isfinite(twin.optimizer.state[twin.params[0]][f"{name}_absmax"]).all()


@pytest.mark.parametrize("size", [1e-18, 1e-22, 1e-40, 1e-44])
@widths
@families
def test_tiny_gradients(family: str, width: int, size: float, backend: str) -> None:
    """Gradients whose squares, and at last themselves, are subnormal or zero in float32."""
    twin = Twin(family, parameters(torch.float32, [SHAPE]), optim_bits=width)
    for step in range(3):
        g = (gradient(SHAPE, torch.float32, step).double() * size).float()
        twin.step(step, [g])
    assert torch.isfinite(twin.params[0]).all()


def _pattern(kind: str) -> torch.Tensor:
    g = torch.full(SHAPE, -0.25)
    if kind == "all_equal_positive":
        g = -g
    elif kind == "one_negative_extreme":
        g = gradient(SHAPE, torch.float32, 0) * 1e-3
        g[:, 17] = -1.0
    elif kind == "two_sided":
        g[:, ::2] = 0.25
    return g


@pytest.mark.parametrize(
    "kind", ["all_equal_positive", "all_equal_negative", "one_negative_extreme", "two_sided"]
)
@widths
@families
def test_extremes_of_a_block(family: str, width: int, kind: str, backend: str) -> None:
    twin = Twin(family, parameters(torch.float32, [SHAPE]), optim_bits=width)
    for _ in range(4):
        twin.step(0, [_pattern(kind)])


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_constant_gradient_reaches_itself_with_either_sign(sign: float, backend: str) -> None:
    """The first moment of g = -1 must become -1; max |x| as scale would leave it at -0.934."""
    p = torch.zeros(20, 256, requires_grad=True)
    optimizer = build_optimizer("adam8bit", [p])
    for _ in range(200):
        p.grad = torch.full_like(p, sign)
        optimizer.step()
    stored = quantized(optimizer.state[p], "exp_avg")
    m = decode32(stored.codes, stored.scales, SIGNED_CODEC)
    np.testing.assert_allclose(m, sign, rtol=1e-5)


@pytest.mark.parametrize("r", [1e-3, 3e-4, 1e-4, 1e-5])
def test_small_gradients_in_a_block_take_no_giant_steps(r: float, backend: str) -> None:
    """The floor of the second moment: at most (1 - b1) / sqrt(1 - b2) learning rates a step."""
    p = torch.zeros(16, 256, requires_grad=True)
    lr = 1e-3
    optimizer = build_optimizer("adam8bit", [p], lr=lr)
    worst = 0.0
    for step in range(100):
        g = torch.full_like(p, r if step % 10 else 0.0)
        g[:, 0] = 1.0
        p.grad = g
        before = p.detach().clone()
        optimizer.step()
        worst = max(worst, float((p.detach() - before).abs().max()) / lr)
    assert worst < 3.2
    codes = quantized(optimizer.state[p], "exp_avg_sq").codes
    assert (codes > 0).all()


@widths
@element_wise
def test_zero_gradient_and_zero_state_never_move(family: str, width: int, backend: str) -> None:
    asked: dict[str, Any] = {"optim_bits": width, "weight_decay": 0.0}
    p = parameters(torch.float32, [SHAPE])[0]
    start = p.detach().clone()
    optimizer = build_optimizer(family, [p], **asked)
    for step in range(10):
        g = gradient(SHAPE, torch.float32, step)
        g[:, ::2] = 0.0
        p.grad = g
        optimizer.step()
    assert torch.equal(p[:, ::2], start[:, ::2])
    assert not torch.equal(p, start)
    if width == 8:
        for state in states_of(family):
            stored = quantized(optimizer.state[p], state.name)
            codec = SIGNED_CODEC if state.signed else UNSIGNED_CODEC
            assert (decode32(stored.codes, stored.scales, codec)[:, ::2] == 0).all()


def test_a_sign_is_the_same_everywhere(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a NaN it is a NaN, of a zero that zero."""

    class SignConfig(OptimizerConfig):
        """Keeps the gradient's sign."""

        family: ClassVar[str] = "sign"

        @classmethod
        def rule(cls, group: Mapping[str, Any]) -> UpdateRule:
            text = "kept = sign(g); u = kept;"
            return UpdateRule("sign", (StateSpec("kept", signed=True),), (), text=text)

        @classmethod
        def scalars(cls, group: Mapping[str, Any], step: Any) -> dict[str, Any]:
            return {"decay": 1.0, "step_size": group["lr"]}

    monkeypatch.setattr(families_module, "_registered", {})
    register(SignConfig)
    inf, nan = float("inf"), float("nan")
    p = torch.zeros(8, requires_grad=True)
    p.grad = torch.tensor([nan, inf, -inf, 0.0, -0.0, 1e-45, -3.0, 0.5])
    optimizer = build_optimizer("sign", [p])
    optimizer.step()
    kept = optimizer.state[p]["kept"]
    wanted = torch.tensor([nan, 1.0, -1.0, 0.0, -0.0, 1.0, -1.0, 1.0])
    torch.testing.assert_close(kept, wanted, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(kept.signbit()[3:], wanted.signbit()[3:])
