"""Adagrad as torch.optim.Adagrad documents it, for one tensor, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from tests.reference.base import Options, State, Update, Values, enter, leave, stepped
from tests.reference.facts import Facts, flip
from tests.reference.tracked import Tracked


@dataclass(frozen=True)
class AdagradOptions(Options):
    """Those of the sum beside all others."""

    lr: float = 1e-2
    lr_decay: float = 0.0
    eps: float = 1e-10
    initial_accumulator_value: float = 0.0


DEFAULTS = AdagradOptions()
STATES = {"sum": False}
FACTS = Facts(
    flips={
        "compat": [flip("bitsandbytes", optim_bits=8)],  # no decay stands apart
        "lr_decay": [flip(0.5), flip(0.5, optim_bits=8)],
        "initial_accumulator_value": [flip(0.1), flip(0.1, optim_bits=8)],
        # A gradient of 0 adds nothing to a sum.
        "skip_zeros": [flip(True, weight_decay=0.1), flip(True, weight_decay=0.1, optim_bits=8)],
    },
    refused={
        "lr_decay": [flip(0.5, compat="bitsandbytes")],
        "initial_accumulator_value": [flip(0.1, compat="bitsandbytes")],
    },
    variants={
        "lr_decay": {"lr_decay": 0.5, "initial_accumulator_value": 0.1, "weight_decay": 0.1},
    },
    longest_step=1.001,  # the first one
    torch_peer="Adagrad",
    torch_cases=[
        {},
        {"lr_decay": 0.1, "weight_decay": 0.1, "eps": 1e-6},
        {"initial_accumulator_value": 0.5, "maximize": True},
    ],
)


def step(p: Values, g: ArrayLike, state: State, o: AdagradOptions) -> Update:
    """s <- s + g^2; theta <- theta - lr / (1 + (t - 1) * lr_decay) * g / (sqrt(s) + eps).

    What sums begin with is in the state that is handed over. Decay is the gradient of
    (wd / 2) |theta|^2.
    """
    start = enter(p, g, state, o)
    grad, before = start.grad, Tracked.exact(state.moments["sum"])
    with np.errstate(all="ignore"):
        if o.weight_decay:
            grad = grad + start.theta * o.weight_decay
        s = (before + grad * grad).saturated()
        direction = (grad / (s.sqrt() + o.eps)).saturated()
        new = stepped(start, o, direction, o.lr / (1 + state.step * o.lr_decay))
    return leave(start, state, o, {"sum": s}, new)
