"""Groups that carry keys of other tools, and groups taken from other optimizers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from optfactory import build_optimizer, resolve
from optfactory.errors import ConfigError


def weight() -> torch.Tensor:
    return torch.ones(300).requires_grad_()


def stepped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("where", ["config", "group"])
def test_named_keys_of_other_tools_are_carried_along(where: str) -> None:
    named = {"annotations": ["layer_id", "swa_lr"]}
    group: dict[str, Any] = {"params": [weight()], "layer_id": 3, "swa_lr": 0.05}
    config, group = (named, group) if where == "config" else ({}, group | named)
    optimizer = stepped(build_optimizer("adamw", [group, {"params": [weight()]}], **config))
    assert [g.get("layer_id") for g in optimizer.param_groups] == [3, None]
    optimizer.add_param_group({"params": [weight()], "layer_id": 4, **named})
    saved = optimizer.state_dict()
    groups = [{"params": [weight()]} for _ in range(3)]
    other = build_optimizer("adamw", groups, **config)
    other.load_state_dict(saved)
    assert [g.get("layer_id") for g in other.param_groups] == [3, None, 4]
    assert other.param_groups[0]["swa_lr"] == 0.05


def test_keys_that_nobody_named_are_refused_with_the_way_to_carry_them() -> None:
    with pytest.raises(ConfigError, match=r"param_groups\[0\]\.layer_id: unknown key.*annotations"):
        build_optimizer("adamw", [{"params": [weight()], "layer_id": 3}])


@pytest.mark.parametrize("key", ["lr", "params", "initial_lr", "noise", "optim_bits"])
def test_keys_that_have_a_meaning_are_no_annotations(key: str) -> None:
    with pytest.raises(ConfigError, match=f"annotations: {key} have a meaning here"):
        resolve("adamw", annotations=[key])


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_live_groups_of_torchs_optimizers_are_read(kind: type[torch.optim.Optimizer]) -> None:
    p, q = weight(), weight()
    theirs = kind([p], lr=0.2, betas=(0.5, 0.6), weight_decay=0.3, eps=1e-3)
    scheduler = torch.optim.lr_scheduler.ConstantLR(theirs, factor=1.0)
    group = theirs.param_groups[0]
    ours = build_optimizer("adam", [{**group, "params": [q]}])
    for _ in range(3):
        stepped(theirs)
        stepped(ours)
        scheduler.step()
    assert torch.allclose(p, q, rtol=1e-6)
    assert "fused" not in ours.param_groups[0]


def test_live_groups_of_ours_are_read() -> None:
    first = stepped(build_optimizer("lamb8bit", [weight()], lr=0.3, percentile_clipping=50))
    again = build_optimizer("lamb8bit", first.param_groups)
    assert again.param_groups[0]["lr"] == 0.3
    assert again.param_groups[0]["percentile_clipping"] == 50
    again.add_param_group({**first.param_groups[0], "params": [weight()]})


def test_groups_of_an_optimizer_without_counterpart_are_refused_by_key() -> None:
    group = torch.optim.SGD([weight()], lr=0.1, momentum=0.9).param_groups[0]
    with pytest.raises(ConfigError, match=r"param_groups\[0\]\.momentum: unknown key"):
        build_optimizer("adam", [group])


def test_ready_rules_may_be_named_in_place_of_rules() -> None:
    model = nn.Linear(64, 64)
    groups = build_optimizer("adamw", model, param_groups="no_decay_1d").param_groups
    assert [(g["name"], g["weight_decay"]) for g in groups] == [
        ("default", 0.01),
        ("no_decay", 0.0),
    ]
    several = resolve("adamw", param_groups=["no_decay_1d", "embeddings_32bit"])
    assert (
        list(several.param_groups) == ["no_decay", "embeddings"] or len(several.param_groups) == 2
    )
    with pytest.raises(ConfigError, match="no rules named 'no_decay'; there are"):
        resolve("adamw", param_groups="no_decay")


def test_a_step_without_any_gradient_says_so_once() -> None:
    optimizer = build_optimizer("adam", [weight()])
    with pytest.warns(UserWarning, match="no parameter of this optimizer has a gradient"):
        optimizer.step()
    optimizer.step()


def test_a_step_of_frozen_parameters_says_nothing() -> None:
    build_optimizer("adam", [weight().requires_grad_(False)]).step()
