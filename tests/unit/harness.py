"""Tools of the unit tests: refused configs, and parameters trained on made-up gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from optfactory import Optimizer2State, build_optimizer, list_optimizers, resolve
from optfactory.errors import ConfigError

NAMES = list_optimizers()
BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048, 4096)
NUMBERS = ("lr", "eps", "weight_decay")


def refusal(cfg: Any, **overrides: Any) -> ConfigError:
    """The error with which a configuration is refused."""
    with pytest.raises(ConfigError) as caught:
        resolve(cfg, **overrides)
    return caught.value


def refused(params: Any, name: str = "adam", **overrides: Any) -> str:
    """The message with which parameters are refused."""
    with pytest.raises(ConfigError) as caught:
        build_optimizer(name, params, **overrides)
    return str(caught.value)


def trainable(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).requires_grad_()


def give_gradients(params: list[Tensor], seed: int = 0) -> None:
    for index, p in enumerate(params):
        generator = torch.Generator().manual_seed(1000 * seed + index)
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def trained(optimizer: Optimizer2State, steps: int = 3) -> list[Tensor]:
    """Copies of all parameters after steps with gradients that only depend on their order."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(steps):
        give_gradients(params, step)
        optimizer.step()
    return [p.detach().clone() for p in params]
