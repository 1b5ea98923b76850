"""Models of the tests of `explain`, and schedulers of a user's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from tests.param_groups.harness import Net


class Listing(Net):
    """A network that says itself what is not to decay, as timm's do."""

    def no_weight_decay(self) -> set[str]:
        return {"embed.weight"}


def tiny() -> nn.Module:
    """An embedding, three blocks with matrices of 4096 elements, a norm and a head."""
    return Listing(depth=3, width=64)


def halving(optimizer: Optimizer, every: int = 10) -> Any:
    """As functions of transformers: takes the optimizer, returns a scheduler."""
    return LambdaLR(optimizer, lambda step: 0.5 ** (step // every))


def lost(optimizer: Optimizer) -> Any:
    """Learning rates that are none from the start."""
    return LambdaLR(optimizer, lambda step: float("nan"))


class Changing:
    """A scheduler of a user's own, which at its third step does something to the optimizer."""

    def __init__(self, optimizer: Optimizer, change: Callable[[Optimizer], object]) -> None:
        self.optimizer, self.change, self.steps = optimizer, change, 0

    def step(self) -> None:
        self.steps += 1
        if self.steps == 3:
            self.change(self.optimizer)


number = 3
