"""Keys that belong to other optimizers or to a framework's own arguments.

Each error names the key, the optimizer, and what to write instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from optfactory import build_optimizer, optim, resolve
from optfactory.errors import ConfigError


def parameters() -> list[torch.Tensor]:
    return [torch.ones(4, requires_grad=True)]


# Every way in which a key of the user reaches an optimizer.
WAYS: dict[str, Callable[[str], Any]] = {
    "override": lambda key: build_optimizer("adamw8bit", parameters(), **{key: 1}),
    "mapping": lambda key: build_optimizer({"name": "adamw8bit", key: 1}, parameters()),
    "node": lambda key: resolve(OmegaConf.create({"name": "adamw8bit", key: 1})),
    "class": lambda key: optim.AdamW8bit(parameters(), **{key: 1}),
    "group": lambda key: build_optimizer("adamw8bit", [{"params": parameters(), key: 1}]),
}


def refusal(build: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        build(*arguments)
    return str(caught.value)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("key", ["fused", "foreach", "momentum", "epsilon"])
def test_every_way_in_names_the_key_and_the_optimizer(way: Callable[[str], Any], key: str) -> None:
    message = refusal(way, key)
    assert "'adamw8bit'" in message
    assert f".{key}: unknown key; " in message


@pytest.mark.parametrize(
    ("key", "remedy"),
    [
        ("fused", "drop the key"),
        ("foreach", "drop the key"),
        ("momentum", "betas"),
        ("beta1", "did you mean 'betas'?"),
        ("beta2", "did you mean 'betas'?"),
        ("epsilon", "did you mean 'eps'?"),
        ("decoupled_weight_decay", "did you mean 'weight_decay'?"),
        ("blocksize", "did you mean 'block_size'?"),
    ],
)
def test_a_key_of_torch_or_bitsandbytes_comes_with_its_remedy(key: str, remedy: str) -> None:
    assert remedy in refusal(WAYS["override"], key)


@pytest.mark.parametrize(
    ("key", "remedy"),
    [
        ("learning_rate", "'lr'"),
        ("adam_beta1", "'betas'"),
        ("adam_epsilon", "'eps'"),
        ("wd", "'weight_decay'"),
        ("bits", "'optim_bits'"),
        ("paged", "'is_paged'"),
        ("optim_args", "keys of the config"),
        ("nesterov", "drop"),
        ("differentiable", "drop"),
        ("max_grad_norm", "clip_grad_norm_"),
    ],
)
def test_a_key_of_hugging_face_or_another_optimizer_comes_with_its_remedy(
    key: str, remedy: str
) -> None:
    assert remedy in refusal(WAYS["override"], key)


def test_groups_of_a_torch_optimizer_name_all_their_foreign_keys_at_once() -> None:
    theirs = torch.optim.SGD(parameters(), lr=0.1, momentum=0.9, differentiable=True)
    message = refusal(build_optimizer, "adamw8bit", theirs.param_groups)
    for key in ("momentum", "dampening", "nesterov", "differentiable"):
        assert f"param_groups[0].{key}: unknown key" in message
    assert "param_groups[0].lr" not in message
