"""adam and adamw beside torch.optim.Adam and torch.optim.AdamW."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from optfactory import build_optimizer, list_optimizers
from tests.conformance.harness import Deviation, apart, feed, pair
from tests.numerics.harness import DTYPES, array
from tests.options.tools import seen
from tests.reference.tracked import spacing

SHAPES = [(1,), (257,), (33, 300), (16, 8, 3, 3)]
STEPS = 60
PEERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}

families = pytest.mark.parametrize("family", PEERS)
amsgrads = pytest.mark.parametrize("amsgrad", [False, True], ids=["plain", "amsgrad"])

Pairs = tuple[list[Tensor], list[Tensor]]


def _train(optimizers: tuple[Any, Any], pairs: Pairs, steps: int = STEPS) -> None:
    for step in range(steps):
        feed(step, *pairs)
        for optimizer in optimizers:
            optimizer.step()


def _assert_equal(pairs: Pairs, path: float, deviation: Deviation) -> None:
    """Within 1e-6 of the parameter and of the longest way it can have gone."""
    for ours, theirs in zip(*pairs, strict=True):
        deviation("p, relative", apart(ours, theirs, path), 1e-6)


def _follow(
    name: str, kind: Any, deviation: Deviation, own: dict[str, Any] | None = None, **asked: Any
) -> None:
    """Train beside the peer and compare parameters and states; `own` is for our side alone."""
    pairs = pair(SHAPES)
    ours = build_optimizer(name, pairs[0], **asked, **(own or {}))
    theirs = kind(pairs[1], **asked)
    _train((ours, theirs), pairs)
    _assert_equal(pairs, STEPS * asked["lr"], deviation)
    for p, q in zip(*pairs, strict=True):
        mine, peer = ours.state[p], theirs.state[q]
        assert set(mine) == set(peer)
        assert mine["step"] == peer["step"]
        for key in set(peer) - {"step"}:
            scale = float(peer[key].abs().max())
            deviation("state, relative", apart(mine[key], peer[key], scale), 1e-6)


@amsgrads
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@families
def test_trajectory_is_that_of_torch(
    family: str, weight_decay: float, amsgrad: bool, backend: str, deviation: Deviation
) -> None:
    asked = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": weight_decay, "amsgrad": amsgrad}
    _follow(f"{family}32bit", PEERS[family], deviation, **asked)


@amsgrads
@families
def test_maximize(family: str, amsgrad: bool, backend: str, deviation: Deviation) -> None:
    """The gradient's sign turns before L2 decay is added to it."""
    asked = {"lr": 1e-2, "weight_decay": 0.1, "amsgrad": amsgrad, "maximize": True}
    _follow(family, PEERS[family], deviation, **asked)


@pytest.mark.parametrize("name", list_optimizers())
def test_maximize_is_the_opposite_gradient_for_every_name(name: str, backend: str) -> None:
    results = []
    for sign, maximize in ((1.0, False), (-1.0, True)):
        params, _ = pair([(33, 300), (257,)])
        optimizer = build_optimizer(name, params, lr=1e-2, weight_decay=0.1, maximize=maximize)
        for step in range(3):
            feed(step, params)
            for p in params:
                p.grad = sign * p.grad
            optimizer.step()
        results.append(seen(optimizer))
    assert results[0] == results[1]


@families
def test_defaults_are_those_of_torch(family: str, backend: str, deviation: Deviation) -> None:
    pairs = pair(SHAPES)
    ours, theirs = build_optimizer(family, pairs[0]), PEERS[family](pairs[1])
    for key in ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize"):
        assert ours.param_groups[0][key] == theirs.param_groups[0][key]
    _train((ours, theirs), pairs)
    _assert_equal(pairs, STEPS * 1e-3, deviation)


@families
def test_switched_decay_is_the_other_optimizer_of_torch(
    family: str, backend: str, deviation: Deviation
) -> None:
    switched = family == "adam"
    other = torch.optim.AdamW if switched else torch.optim.Adam
    _follow(family, other, deviation, {"adam_w_mode": switched}, lr=1e-3, weight_decay=0.1)


@families
def test_learning_rate_as_a_tensor(family: str, backend: str, deviation: Deviation) -> None:
    """Given as a 0-d tensor at first and replaced by another one later."""
    pairs = pair(SHAPES)
    ours = build_optimizer(family, pairs[0], lr=torch.tensor(1e-2))
    theirs = PEERS[family](pairs[1], lr=torch.tensor(1e-2), foreach=False)
    _train((ours, theirs), pairs)
    for optimizer in (ours, theirs):
        optimizer.param_groups[0]["lr"] = torch.tensor(1e-3)
    _train((ours, theirs), pairs, STEPS // 2)
    _assert_equal(pairs, STEPS * 1e-2, deviation)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@families
def test_16_bit_parameters_are_those_of_float64_rounded_once(
    family: str, dtype: str, backend: str, deviation: Deviation
) -> None:
    """torch in float64 is the oracle: its state goes on, its parameters start from the stored ones.

    torch's own 16-bit state is no measure, for it rounds the moments to 16 bits.
    """
    ours = pair(SHAPES, DTYPES[dtype])[0]
    exact = [p.detach().double().requires_grad_() for p in ours]
    asked = {"lr": 1e-2, "weight_decay": 0.1, "maximize": True}
    optimizer = build_optimizer(family, ours, **asked)
    oracle = PEERS[family](exact, **asked)
    for step in range(STEPS // 2):
        with torch.no_grad():
            for p, q in zip(ours, exact, strict=True):
                q.copy_(p)
        feed(step, ours, exact)
        optimizer.step()
        oracle.step()
        for p, q in zip(ours, exact, strict=True):
            want = array(q)
            beyond = np.abs(array(p) - want) - 0.5 * spacing(want, p.dtype)
            deviation("p beyond half a unit", (beyond / (np.abs(want) + 1e-2)).max(), 1e-6)


@families
def test_param_groups_keep_their_own_hyperparameters(
    family: str, backend: str, deviation: Deviation
) -> None:
    pairs = pair([(257,), (33, 300), (16, 8, 3, 3)])
    own: list[dict[str, Any]] = [
        {"lr": 1e-2}, {"betas": (0.5, 0.9), "eps": 1e-6}, {"weight_decay": 0.2, "maximize": True}
    ]  # fmt: skip
    groups = [[{"params": [p], **kw} for p, kw in zip(side, own, strict=True)] for side in pairs]
    ours = build_optimizer(family, groups[0], lr=1e-3)
    theirs = PEERS[family](groups[1], lr=1e-3)
    _train((ours, theirs), pairs)
    _assert_equal(pairs, STEPS * 1e-2, deviation)


@families
def test_scheduler_and_add_param_group(family: str, backend: str, deviation: Deviation) -> None:
    pairs, late = pair([(257,)]), pair([(70, 64)])
    ours = build_optimizer(family, pairs[0], lr=1e-2)
    theirs = PEERS[family](pairs[1], lr=1e-2)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (ours, theirs)]
    _train((ours, theirs), pairs)
    ours.add_param_group({"params": late[0], "lr": 1e-2})
    theirs.add_param_group({"params": late[1], "lr": 1e-2})
    for scheduler in schedulers:
        scheduler.step()
    everything = pairs[0] + late[0], pairs[1] + late[1]
    _train((ours, theirs), everything, STEPS // 2)
    _assert_equal(everything, STEPS * 1e-2, deviation)
    assert ours.param_groups[0]["lr"] == theirs.param_groups[0]["lr"]
