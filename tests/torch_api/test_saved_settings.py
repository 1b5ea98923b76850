"""A state dict does not change while schedules go on, nor does a loaded one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from optfactory import Optimizer2State, build_optimizer
from tests.torch_api.harness import held, parameters, train


def build(groups: int = 1) -> Optimizer2State:
    params: list[Any] = [{"params": [p]} for p in parameters()[:groups]]
    return build_optimizer("adam", params, lr=torch.tensor(0.1))


def test_a_state_dict_keeps_the_learning_rate_it_was_taken_with() -> None:
    optimizer = build()
    optimizer.param_groups[0]["initial_lr"] = torch.tensor(0.1)
    optimizer.param_groups[0]["history"] = [torch.tensor(0.1)]
    saved = optimizer.state_dict()["param_groups"][0]
    for key in ("lr", "initial_lr"):
        optimizer.param_groups[0][key].fill_(0.5)
    optimizer.param_groups[0]["history"][0].fill_(0.5)
    optimizer.param_groups[0]["history"].append(7)
    assert saved["lr"] == saved["initial_lr"] == torch.tensor(0.1)
    assert saved["history"] == [torch.tensor(0.1)]


def test_loaded_learning_rates_are_each_groups_own() -> None:
    optimizer = build(groups=3)
    saved = optimizer.state_dict()
    shared = torch.tensor(1.0)
    for group in saved["param_groups"]:
        group["lr"] = shared
    optimizer.load_state_dict(saved)
    for group in optimizer.param_groups:
        group["lr"].mul_(0.5)
    assert [float(group["lr"]) for group in optimizer.param_groups] == [0.5, 0.5, 0.5]
    assert shared == 1


def test_a_learning_rate_that_is_learned_is_saved_as_a_number() -> None:
    optimizer = build()
    lr = torch.tensor(0.25, requires_grad=True)
    optimizer.param_groups[0]["lr"] = lr * 1
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["lr"].is_leaf
    optimizer.load_state_dict(saved)
    assert float(optimizer.param_groups[0]["lr"]) == 0.25


@pytest.mark.parametrize("hook", ["pre", "post"])
def test_hooks_of_state_dicts_run_as_torchs(hook: str) -> None:
    optimizer = build()
    seen: list[Any] = []
    if hook == "pre":
        optimizer.register_state_dict_pre_hook(seen.append)
        optimizer.state_dict()
        assert seen == [optimizer]
    else:
        optimizer.register_state_dict_post_hook(lambda _, saved: {**saved, "extra": 1})
        optimizer.register_state_dict_post_hook(lambda _, saved: seen.append(saved["extra"]))
        assert optimizer.state_dict()["extra"] == 1
        assert seen == [1]


@pytest.mark.parametrize("name", ["adamw", "lamb8bit"])
def test_a_state_dict_has_the_form_of_torchs(name: str) -> None:
    optimizer = build_optimizer(name, [{"params": [p]} for p in parameters()])
    train(optimizer, range(1))
    ours, torchs = optimizer.state_dict(), torch.optim.Optimizer.state_dict(optimizer)
    assert [list(group) for group in ours["param_groups"]] == [
        list(group) for group in torchs["param_groups"]
    ]
    assert ours["param_groups"] == torchs["param_groups"]
    assert list(ours["state"]) == list(torchs["state"])
    for index in range(len(held(optimizer))):
        assert list(ours["state"][index]) == list(torchs["state"][index])
        assert all(
            one is other
            for one, other in zip(
                ours["state"][index].values(), torchs["state"][index].values(), strict=True
            )
        )
