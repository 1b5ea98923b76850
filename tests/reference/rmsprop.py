"""RMSprop as torch.optim.RMSprop documents it, for one tensor, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from tests.reference.base import Options, State, Update, Values, enter, leave, stepped
from tests.reference.facts import Facts, flip
from tests.reference.tracked import Tracked


@dataclass(frozen=True)
class RMSpropOptions(Options):
    """Those of the second moment and of the momentum beside all others."""

    lr: float = 1e-2
    alpha: float = 0.99
    momentum: float = 0.0
    centered: bool = False


DEFAULTS = RMSpropOptions()
STATES = {"square_avg": False}
FACTS = Facts(
    more_states={"momentum_buffer": True},
    flips={
        "compat": [flip("bitsandbytes", optim_bits=8)],  # no decay stands apart
        "alpha": [flip(0.9), flip(0.0), flip(0.9, optim_bits=8)],
        "momentum": [flip(0.5), flip(0.5, optim_bits=8)],
        "centered": [flip(True), flip(True, momentum=0.5)],
    },
    refused={"centered": [*(flip(True, optim_bits=bits) for bits in (4, 8, 16))]},
    variants={
        "alpha": {"alpha": 0.9, "eps": 1e-3, "momentum": 0.5, "weight_decay": 0.1},
        "centered": {"centered": True, "optim_bits": 32},
    },
    peak_lr=3e-3,
    longest_step=1 / (1 - 0.99) ** 0.5,  # the first one
    torch_peer="RMSprop",
    torch_cases=[
        {},
        {"alpha": 0.9, "eps": 1e-4, "weight_decay": 0.1},
        {"momentum": 0.8, "maximize": True},
        {"centered": True, "eps": 1e-2, "momentum": 0.5},
    ],
)


def step(p: Values, g: ArrayLike, state: State, o: RMSpropOptions) -> Update:
    """v <- alpha * v + (1 - alpha) * g^2; theta <- theta - lr * g / (sqrt(v) + eps).

    Centered, the root is of v - a^2 with a <- alpha * a + (1 - alpha) * g, and with momentum the
    step is by b <- momentum * b + g / (sqrt(v) + eps). Decay is the gradient of (wd / 2) |theta|^2.
    """
    start = enter(p, g, state, o)
    grad = start.grad
    before = {name: Tracked.exact(moment) for name, moment in state.moments.items()}
    with np.errstate(all="ignore"):
        if o.weight_decay:
            grad = grad + start.theta * o.weight_decay
        v = (before["square_avg"] * o.alpha + (grad * (1 - o.alpha)) * grad).saturated()
        kept, spread = {"square_avg": v}, v
        if o.centered:
            kept["grad_avg"] = a = (before["grad_avg"] * o.alpha + grad * (1 - o.alpha)).saturated()
            spread = (v - a * a).maximum(Tracked.exact(0.0))
        direction = (grad / (spread.sqrt() + o.eps)).saturated()
        if o.momentum:
            direction = (before["momentum_buffer"] * o.momentum + direction).saturated()
            kept["momentum_buffer"] = direction
        new = stepped(start, o, direction, o.lr)
    return leave(start, state, o, kept, new)
