"""SGD as torch.optim.SGD documents it, for one tensor, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from tests.reference.base import Options, State, Update, Values, enter, leave, stepped
from tests.reference.facts import Facts, flip
from tests.reference.tracked import Tracked


@dataclass(frozen=True)
class SGDOptions(Options):
    """Those of the momentum beside all others."""

    momentum: float = 0.9
    dampening: float = 0.0
    nesterov: bool = False


DEFAULTS = SGDOptions()
STATES = {"momentum_buffer": True}
FACTS = Facts(
    flips={
        "compat": [flip("bitsandbytes", optim_bits=8)],  # no decay stands apart
        "momentum": [flip(0.5), flip(0.5, optim_bits=8), flip(0.0)],
        "dampening": [flip(0.5), flip(0.5, optim_bits=8)],
        "nesterov": [flip(True), flip(True, optim_bits=8)],
    },
    refused={
        "momentum": [*(flip(0.0, optim_bits=bits) for bits in (4, 8, 16))],
        "dampening": [flip(0.5, momentum=0.0)],
        "nesterov": [flip(True, momentum=0.0), flip(True, dampening=0.5)],
    },
    variants={
        "momentum": {"momentum": 0.5, "dampening": 0.25, "weight_decay": 0.1},
        "nesterov": {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1},
        "no_momentum": {"momentum": 0.0, "weight_decay": 0.1, "optim_bits": 32},
    },
    peak_lr=0.1,
    longest_step=10.001,  # 1 / (1 - 0.9)
    torch_peer="SGD",
    torch_cases=[
        {"momentum": 0.9},
        {"momentum": 0.9, "weight_decay": 0.1, "dampening": 0.25},
        {"momentum": 0.8, "weight_decay": 0.1, "nesterov": True},
        {"momentum": 0.9, "weight_decay": 0.1, "maximize": True},
        {"momentum": 0.0, "weight_decay": 0.1},
    ],
)


def step(p: Values, g: ArrayLike, state: State, o: SGDOptions) -> Update:
    """b <- g at the first step, then momentum * b + (1 - dampening) * g; theta <- theta - lr * b.

    With nesterov the step is by g + momentum * b; without momentum it is by g. Decay is the
    gradient of (wd / 2) |theta|^2.
    """
    start = enter(p, g, state, o)
    grad = start.grad
    with np.errstate(all="ignore"):
        if o.weight_decay:
            grad = grad + start.theta * o.weight_decay
        b = grad.saturated()
        if not o.momentum:
            return leave(start, state, o, {}, stepped(start, o, b, o.lr))
        if state.step:
            before = Tracked.exact(state.moments["momentum_buffer"])
            b = (before * o.momentum + grad * (1 - o.dampening)).saturated()
        direction = (grad + b * o.momentum).saturated() if o.nesterov else b
        new = stepped(start, o, direction, o.lr)
    return leave(start, state, o, {"momentum_buffer": b}, new)
