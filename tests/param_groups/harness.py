"""Tools of the tests of rules for param groups: tiny models, and what each parameter got."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optfactory import Optimizer2State, build_optimizer
from optfactory.errors import ConfigError

Rules = dict[str, Any]

WIDTH = 4


class Block(nn.Module):
    """A block with a norm, as transformers have it."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(self.norm(x))


class Net(nn.Module):
    """An embedding, blocks and a head; forward takes tokens.

    Args:
        tied: whether the head's weight is the embedding's.
    """

    def __init__(self, depth: int = 2, tied: bool = False, width: int = WIDTH) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def names_of(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def built(params: Any, rules: Rules, name: str = "adamw", **overrides: Any) -> Optimizer2State:
    return build_optimizer(name, params, param_groups=rules, **overrides)


def got(optimizer: Optimizer2State, key: str) -> dict[str, Any]:
    """A hyperparameter of every parameter, by the parameter's name."""
    return {
        name: group[key]
        for group in optimizer.param_groups
        for name, _ in zip(group["param_names"], group["params"], strict=True)
    }


def marked(params: Any, matchers: Rules, **overrides: Any) -> set[str]:
    """The names of the parameters that one rule matches."""
    optimizer = built(params, {"rule": {**matchers, "weight_decay": 0.625}}, **overrides)
    return {name for name, decay in got(optimizer, "weight_decay").items() if decay == 0.625}


def labels(optimizer: Optimizer2State) -> list[str]:
    return [group["name"] for group in optimizer.param_groups]


def refusal(params: Any, rules: Any, name: str = "adamw", **overrides: Any) -> ConfigError:
    """The error with which rules are refused."""
    with pytest.raises(ConfigError) as caught:
        built(params, rules, name, **overrides)
    return caught.value


def problems(params: Any, rules: Any, name: str = "adamw", **overrides: Any) -> tuple[str, ...]:
    return refusal(params, rules, name, **overrides).problems


def copy_of(model: nn.Module) -> nn.Module:
    """A model of the same class with the same values, in tensors of its own."""
    other = type(model)()
    other.load_state_dict(model.state_dict())
    return other


def give_gradients(model: nn.Module, step: int) -> None:
    """Gradients that depend on the parameter's name alone, not on its place in the optimizer."""
    for index, (_, p) in enumerate(sorted(model.named_parameters())):
        generator = torch.Generator().manual_seed(97 * step + index)
        p.grad = torch.randn(p.shape, generator=generator)
