"""SGD as torch.optim.SGD documents it, for one tensor, in float64."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from tests.reference.base import Options, State, Update, Values, enter, leave
from tests.reference.tracked import Tracked

DEFAULTS = Options(momentum=0.9)
STATES = {"momentum_buffer": True}


def step(p: Values, g: ArrayLike, state: State, o: Options) -> Update:
    """b <- g at the first step, then momentum * b + (1 - dampening) * g; theta <- theta - lr * b.

    With nesterov the step is by g + momentum * b. Decay is the gradient of (wd / 2) |theta|^2.
    """
    start = enter(p, g, state, o)
    grad = start.grad
    with np.errstate(all="ignore"):
        if o.weight_decay:
            grad = grad + start.theta * o.weight_decay
        b = grad.saturated()
        if state.step:
            before = Tracked.exact(state.moments["momentum_buffer"])
            b = (before * o.momentum + grad * (1 - o.dampening)).saturated()
        direction = (grad + b * o.momentum).saturated() if o.nesterov else b
        new = start.theta - direction * o.lr
    return leave(start, state, o, {"momentum_buffer": b}, new)
