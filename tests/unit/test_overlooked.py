"""Settings made in bitsandbytes, which optimizers here do not read: one warning says what to do."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import nn

from optfactory import build_optimizer, optim, ready_rules

Manager = bitsandbytes.optim.GlobalOptimManager


@pytest.fixture(autouse=True)
def manager() -> Iterator[Any]:
    """As in a process of its own."""
    before, Manager._instance = Manager._instance, None
    yield Manager.get_instance()
    Manager._instance = before


def model() -> nn.Module:
    return nn.Sequential(nn.Embedding(100, 64), nn.Linear(64, 100))


def stable() -> nn.Module:
    return nn.Sequential(bitsandbytes.nn.StableEmbedding(100, 64), nn.Linear(64, 100))


def step(optimizer: torch.optim.Optimizer, net: nn.Module) -> None:
    net(torch.arange(10)).sum().backward()
    optimizer.step()


def test_an_override_is_told_with_its_counterpart(manager: Any) -> None:
    net = model()
    manager.register_parameters(net.parameters())
    manager.override_config(net[0].weight, "optim_bits", 32)
    with pytest.warns(UserWarning, match=r"optim_bits=32 for 0\.weight, which this") as caught:
        optimizer = build_optimizer("adamw8bit", net)
    message = str(caught[0].message)
    assert "GlobalOptimManager" in message
    assert "param_groups" in message
    assert "embeddings_32bit" in message
    step(optimizer, net)  # told once


def test_what_the_warning_advises_ends_it(manager: Any) -> None:
    for net in (stable(), model()):
        manager.override_config(net[0].weight, "optim_bits", 32)
        build_optimizer("adamw8bit", net, param_groups=ready_rules("embeddings_32bit"))
        rules = {"embeddings": {"modules": "Embedding", "optim_bits": 32}}
        build_optimizer("adamw8bit", net, param_groups=rules)
        build_optimizer("adamw", net)  # has 32 bits everywhere


def test_an_override_between_building_and_the_first_step_is_told(manager: Any) -> None:
    # The order in bitsandbytes' own example.
    net = model()
    optimizer = optim.AdamW8bit(net.parameters(), lr=1e-3)
    manager.override_config(net[1].weight, key_value_dict={"optim_bits": 32, "lr": 0.5})
    with pytest.warns(UserWarning, match=r"optim_bits=32, lr=0\.5 for .*\[1\], which") as caught:
        step(optimizer, net)
    assert len(caught) == 1
    step(optimizer, net)


def test_a_stable_embedding_is_told_and_so_is_its_copy(manager: Any) -> None:
    copied = copy.deepcopy(stable())
    manager.initialize()
    for net in (copied, stable()):
        with pytest.warns(UserWarning, match=r"StableEmbedding says optim_bits=32 for 0\.weight"):
            build_optimizer("paged_adamw8bit", net)


def test_parameters_without_names_are_told_by_their_place(manager: Any) -> None:
    net = model()
    params = [p.detach().requires_grad_() for p in net.parameters()]
    for p in params:
        manager.override_config(p, "optim_bits", 32)
    with pytest.warns(UserWarning, match=r"for param_groups\[0\]\['params'\]\[0\], param_groups"):
        build_optimizer("adamw8bit", params)


def test_overrides_of_other_parameters_and_of_what_holds_anyway_are_no_matter(manager: Any) -> None:
    net, other = model(), model()
    manager.override_config(list(other.parameters()), "optim_bits", 32)
    manager.override_config(net[0].weight, key_value_dict={"optim_bits": 8, "betas": [0.9, 0.999]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(build_optimizer("adamw8bit", net), net)


def test_bitsandbytes_is_not_imported_for_it() -> None:
    program = (
        "import sys, torch, optfactory\n"
        "p = torch.ones(4, requires_grad=True)\n"
        "optfactory.build_optimizer('adam', [p])\n"
        "assert 'bitsandbytes' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
