"""adam and adamw beside torch.optim.Adam and torch.optim.AdamW in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from optfactory import build_optimizer
from tests.numerics.harness import gradient, parameters

SHAPES = [(1,), (257,), (33, 300), (16, 8, 3, 3)]
STEPS = 25
PEERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}

families = pytest.mark.parametrize("family", PEERS)


def _pair(shapes: list[tuple[int, ...]] = SHAPES) -> tuple[list[Tensor], list[Tensor]]:
    ours = parameters(torch.float32, shapes)
    return ours, [p.detach().clone().requires_grad_() for p in ours]


def _train(optimizers: tuple[Any, Any], pairs: tuple[list[Tensor], list[Tensor]]) -> None:
    for step in range(STEPS):
        for i, (ours, theirs) in enumerate(zip(*pairs, strict=True)):
            ours.grad = gradient(tuple(ours.shape), torch.float32, 1000 * step + i)
            theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()


def _assert_equal(pairs: tuple[list[Tensor], list[Tensor]], path: float) -> None:
    """Within 1e-6 of the parameter and of the longest way it can have gone."""
    for ours, theirs in zip(*pairs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6 * path)


@families
@pytest.mark.parametrize("weight_decay", [0.0, 0.01, 0.1])
@pytest.mark.parametrize("amsgrad", [False, True], ids=["plain", "amsgrad"])
def test_trajectory_is_that_of_torch(
    family: str, weight_decay: float, amsgrad: bool, backend: str
) -> None:
    pairs = _pair()
    settings: dict[str, Any] = {
        "lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": weight_decay, "amsgrad": amsgrad
    }  # fmt: skip
    ours = build_optimizer(f"{family}32bit", pairs[0], **settings)
    theirs = PEERS[family](pairs[1], **settings)
    _train((ours, theirs), pairs)
    _assert_equal(pairs, STEPS * settings["lr"])
    for p, q in zip(*pairs, strict=True):
        mine, peer = ours.state[p], theirs.state[q]
        assert set(mine) == set(peer)
        assert mine["step"] == peer["step"]
        for key in set(peer) - {"step"}:
            scale = float(peer[key].abs().max())
            torch.testing.assert_close(mine[key], peer[key], rtol=1e-6, atol=1e-6 * scale)


@families
def test_defaults_are_those_of_torch(family: str, backend: str) -> None:
    pairs = _pair()
    ours, theirs = build_optimizer(family, pairs[0]), PEERS[family](pairs[1])
    for key in ("lr", "betas", "eps", "weight_decay", "amsgrad"):
        assert ours.param_groups[0][key] == theirs.param_groups[0][key]
    _train((ours, theirs), pairs)
    _assert_equal(pairs, STEPS * 1e-3)


@families
def test_switched_decay_is_the_other_optimizer_of_torch(family: str, backend: str) -> None:
    pairs = _pair()
    switched = family == "adam"
    other = torch.optim.AdamW if switched else torch.optim.Adam
    ours = build_optimizer(family, pairs[0], weight_decay=0.1, adam_w_mode=switched)
    theirs = other(pairs[1], weight_decay=0.1)
    _train((ours, theirs), pairs)
    _assert_equal(pairs, STEPS * 1e-3)


@families
def test_learning_rate_as_a_tensor(family: str, backend: str) -> None:
    """Given as a 0-d tensor at first and replaced by another one later."""
    pairs = _pair()
    ours = build_optimizer(family, pairs[0], lr=torch.tensor(1e-2))
    theirs = PEERS[family](pairs[1], lr=torch.tensor(1e-2), foreach=False)
    _train((ours, theirs), pairs)
    for optimizer in (ours, theirs):
        optimizer.param_groups[0]["lr"] = torch.tensor(1e-3)
    _train((ours, theirs), pairs)
    _assert_equal(pairs, STEPS * 2e-2)


@families
def test_param_groups_keep_their_own_hyperparameters(family: str, backend: str) -> None:
    pairs = _pair([(257,), (33, 300), (16, 8, 3, 3)])
    own: list[dict[str, Any]] = [
        {"lr": 1e-2}, {"betas": (0.5, 0.9), "eps": 1e-6}, {"weight_decay": 0.2}
    ]  # fmt: skip
    groups = [[{"params": [p], **kw} for p, kw in zip(side, own, strict=True)] for side in pairs]
    ours = build_optimizer(family, groups[0], lr=1e-3)
    theirs = PEERS[family](groups[1], lr=1e-3)
    _train((ours, theirs), pairs)
    _assert_equal(pairs, STEPS * 1e-2)


@families
def test_scheduler_and_add_param_group(family: str, backend: str) -> None:
    pairs, late = _pair([(257,)]), _pair([(70, 64)])
    ours = build_optimizer(family, pairs[0], lr=1e-2)
    theirs = PEERS[family](pairs[1], lr=1e-2)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (ours, theirs)]
    _train((ours, theirs), pairs)
    ours.add_param_group({"params": late[0], "lr": 1e-2})
    theirs.add_param_group({"params": late[1], "lr": 1e-2})
    for scheduler in schedulers:
        scheduler.step()
    everything = pairs[0] + late[0], pairs[1] + late[1]
    _train((ours, theirs), everything)
    _assert_equal(everything, STEPS * 2e-2)
    assert ours.param_groups[0]["lr"] == theirs.param_groups[0]["lr"]
