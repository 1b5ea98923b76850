"""Hyperparameters that users change between steps: they act, or the next step refuses them."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from optfactory import build_optimizer
from optfactory.errors import ConfigError
from tests.torch_api.harness import bits, held, snapshot, train, trained, weight

BAD = [
    ("betas", (2, 2)),
    ("betas", [0.9]),
    ("betas", np.zeros(3)),
    ("eps", "small"),
    ("eps", -1e-8),
    ("weight_decay", None),
    ("weight_decay", float("nan")),
    ("lr", None),
    ("lr", "fast"),
    ("lr", float("nan")),
    ("lr", float("inf")),
    ("lr", -1e-3),
    ("lr", True),
    ("lr", torch.ones(2)),
    ("lr", torch.tensor(float("nan"))),
    ("lr", torch.ones((), device="meta")),
    ("maximize", "perhaps"),
    ("percentile_clipping", 101),
]


@pytest.mark.parametrize(("key", "value"), BAD, ids=str)
def test_a_bad_value_is_refused_before_anything_is_counted(
    key: str, value: Any, backend: str
) -> None:
    params = [weight(), weight(70, 80)]
    groups = [{"params": [params[0]]}, {"params": [params[1]]}]
    optimizer = build_optimizer("adam", groups, lr=0.1)
    train(optimizer, range(1))
    group = optimizer.param_groups[1]
    good, group[key] = group[key], value
    before = [bits(p) for p in params]
    for _ in range(2):
        with pytest.raises(ConfigError, match=rf"param_groups\[1\]\.{key}[.:]"):
            optimizer.step()
        assert [bits(p) for p in params] == before
        assert [optimizer.state[p]["step"].item() for p in params] == [1, 1]
    group[key] = good
    optimizer.step()
    assert optimizer.state[params[0]]["step"] == 2


def test_a_key_that_is_gone_is_named(backend: str) -> None:
    optimizer = trained("adam")
    del optimizer.param_groups[0]["eps"]
    with pytest.raises(ConfigError, match=r"param_groups\[0\]\.eps: is missing"):
        optimizer.step()


def test_a_tensor_learning_rate_that_becomes_bad_in_place_is_refused(backend: str) -> None:
    lr = torch.tensor(0.1)
    p = weight()
    optimizer = build_optimizer("adam", [p], lr=lr)
    train(optimizer, range(1))
    optimizer.param_groups[0]["lr"].fill_(float("nan"))
    with pytest.raises(ConfigError, match=r"lr: expected a number from 0 on"):
        optimizer.step()
    assert optimizer.state[p]["step"] == 1


def test_text_lists_and_numpy_numbers_act_as_the_values_they_mean(backend: str) -> None:
    given = {"lr": np.float64(0.2), "eps": "1e-3", "betas": [0.5, np.float32(0.5)], "maximize": 1}
    plain = {"lr": 0.2, "eps": 1e-3, "betas": (0.5, 0.5), "maximize": True}
    one, other = trained("adam"), trained("adam")
    one.param_groups[0].update(given)
    other.param_groups[0].update(plain)
    train(one, range(3, 5))
    train(other, range(3, 5))
    assert list(map(bits, held(one))) == list(map(bits, held(other)))
    group = one.param_groups[0]
    assert {key: group[key] for key in plain} == plain
    assert all(type(group[key]) is type(value) for key, value in plain.items())


# What changes a step from now on, with state that is as it was or starts from zero.
ACTING = [
    ("adam", "maximize", True, {}),
    ("adam", "skip_zeros", True, {}),
    ("adam", "bias_correction", False, {}),
    ("adam", "adam_w_mode", True, {"weight_decay": 0.5}),
    ("adam", "percentile_clipping", 5, {}),
    ("adam8bit", "second_moment_floor", False, {}),
    ("adam8bit", "percentile_clipping", 5, {}),
    ("lamb", "trust_ratio", "clip", {}),
    ("lamb8bit", "always_adapt", False, {"weight_decay": 0.0}),
    ("adam", "param_rounding", "kahan", {}),
    ("adam", "master_weights", "split", {}),
    ("adam", "cautious", True, {}),
    ("adamw8bit", "cautious_weight_decay", True, {"weight_decay": 0.5, "lr": 0.1}),
    ("adam8bit", "param_rounding", "stochastic", {"lr": 0.1}),
    ("adam8bit", "state_rounding", "stochastic", {}),
]


def steps_with_zeros(optimizer: Any, steps: range) -> None:
    """As `train`, with gradients that are now and then 0 and small second moments."""
    for step in steps:
        for index, p in enumerate(held(optimizer)):
            generator = torch.Generator().manual_seed(1000 * step + index)
            grad = torch.randn(p.shape, generator=generator) * (1 + 9 * (step % 2))
            grad[grad.abs() < 0.3] = 0.0
            p.grad = grad.to(p.dtype) * torch.logspace(-5, 0, p.shape[-1]).to(p.dtype)
        optimizer.step()


@pytest.mark.parametrize(("name", "key", "value", "options"), ACTING, ids=str)
def test_a_switch_that_can_act_acts(
    name: str, key: str, value: Any, options: dict[str, Any], backend: str
) -> None:
    results = []
    for changed in (False, True):
        p = torch.full((80, 70), 1.0, dtype=torch.bfloat16).requires_grad_()
        optimizer = build_optimizer(name, [p], **options)
        steps_with_zeros(optimizer, range(3))
        if changed:
            optimizer.param_groups[0][key] = value
        steps_with_zeros(optimizer, range(3, 12))
        results.append(bits(p) + b"".join(bits(t) for t in optimizer.state[p].values()))
    assert results[0] != results[1]


def test_an_option_that_is_switched_off_drops_what_it_kept(backend: str) -> None:
    optimizer = trained("adam", percentile_clipping=5)
    optimizer.param_groups[0]["percentile_clipping"] = 100
    train(optimizer, range(3, 4))
    assert "gnorm_vec" not in optimizer.state[held(optimizer)[0]]


REFUSED = [
    ("adam", "optim_bits", 8),
    ("adam8bit", "optim_bits", 32),
    ("adam8bit", "block_size", 128),
    ("adam8bit", "signed_map", "symmetric"),
    ("adam8bit", "block_wise", False),
    ("adam8bit", "min_8bit_size", 10**6),
    ("adam", "amsgrad", True),
    ("adam", "is_paged", True),
    ("paged_adam", "is_paged", False),
]


@pytest.mark.usefixtures("small_tensors")
@pytest.mark.parametrize(("name", "key", "value"), REFUSED, ids=str)
def test_a_switch_that_the_state_cannot_follow_is_refused_at_every_step(
    name: str, key: str, value: Any, backend: str
) -> None:
    optimizer = trained(name)
    before = snapshot(optimizer)
    good = optimizer.param_groups[0][key]
    for _ in range(2):
        optimizer.param_groups[0][key] = value
        with pytest.raises(ConfigError, match=rf"param_groups\[0\]\.{key}: was {good!r} when"):
            optimizer.step()
        optimizer.param_groups[0][key] = good
        assert snapshot(optimizer) == before
    train(optimizer, range(3, 4))


@pytest.mark.parametrize("key", ["optim_bits", "block_size", "amsgrad"])
def test_before_there_is_state_every_switch_acts(key: str, backend: str) -> None:
    value, shape = {"optim_bits": (8, (80,)), "block_size": (64, (80, 2)), "amsgrad": (True, ())}[
        key
    ]
    optimizer = build_optimizer("adam8bit" if key == "block_size" else "adam", [weight(80, 70)])
    optimizer.param_groups[0][key] = value
    train(optimizer, range(1))
    found = {name: tuple(t.shape) for name, t in optimizer.state[held(optimizer)[0]].items()}
    assert ("max_exp_avg_sq" in found) == (key == "amsgrad")
    if key != "amsgrad":
        assert found["exp_avg_absmax"][: len(shape)] == shape


def test_settings_are_followed_by_copies(backend: str) -> None:
    optimizer = trained("adam")
    twin = copy.deepcopy(optimizer)
    twin.param_groups[0]["maximize"] = True
    train(twin, range(3, 5))
    train(optimizer, range(3, 5))
    assert list(map(bits, held(twin))) != list(map(bits, held(optimizer)))


def test_each_group_has_a_tensor_learning_rate_of_its_own(backend: str) -> None:
    lr = torch.tensor(1.0)
    groups: list[dict[str, Any]] = [{"params": [weight()]} for _ in range(3)]
    optimizer = build_optimizer("adam", groups, lr=lr)
    for group in optimizer.param_groups:
        group["lr"] *= 0.1
    rates: list[Tensor] = [group["lr"] for group in optimizer.param_groups]
    assert [rate.item() for rate in rates] == pytest.approx([0.1] * 3)
    own: list[dict[str, Any]] = [{"params": [weight()], "lr": rates[0]} for _ in range(2)]
    shared = build_optimizer("adam", own)
    assert len({id(group["lr"]) for group in shared.param_groups}) == 2


def test_schedules_change_each_group_by_its_own_factor(backend: str) -> None:
    groups: list[dict[str, Any]] = [{"params": [weight()]} for _ in range(2)]
    optimizer = build_optimizer("adam", groups, lr=torch.tensor(1.0))
    factors = [lambda epoch: 0.5**epoch, lambda epoch: 0.1**epoch]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
    train(optimizer, range(1))
    schedule.step()
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.5, 0.1])
