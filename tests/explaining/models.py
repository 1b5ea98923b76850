"""Models of the tests of `explain`, and schedulers of a user's own."""

from __future__ import annotations

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


number = 3
