"""Lion (Chen et al. 2023, arXiv 2302.06675, Algorithm 2) for one tensor, in float64."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from tests.reference.base import Options, State, Update, Values, enter, leave, stepped
from tests.reference.tracked import Tracked

DEFAULTS = Options(lr=1e-4, betas=(0.9, 0.99), adam_w_mode=True)  # decay apart from the gradient
STATES = {"exp_avg": True}  # whether it can be negative


def step(p: Values, g: ArrayLike, state: State, o: Options) -> Update:
    """theta <- theta - lr * wd * theta - lr * sign(beta1 * m + (1 - beta1) * g)."""
    start = enter(p, g, state, o)
    before, (beta1, beta2) = Tracked.exact(state.moments["exp_avg"]), o.betas
    with np.errstate(all="ignore"):
        direction = (before * beta1 + start.grad * (1 - beta1)).sign()
        m = (before * beta2 + start.grad * (1 - beta2)).saturated()
        new = stepped(start, o, direction, o.lr)
    return leave(start, state, o, {"exp_avg": m}, new)
