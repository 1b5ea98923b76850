"""RMSprop as torch.optim.RMSprop documents it, for one tensor, in float64."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from tests.reference.base import Options, State, Update, Values, enter, leave
from tests.reference.tracked import Tracked

DEFAULTS = Options(lr=1e-2, alpha=0.99, eps=1e-8)
STATES = {"square_avg": False}


def step(p: Values, g: ArrayLike, state: State, o: Options) -> Update:
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
        new = start.theta - direction * o.lr
    return leave(start, state, o, kept, new)
