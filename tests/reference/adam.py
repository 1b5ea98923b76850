"""Adam (Kingma & Ba 2015, arXiv 1412.6980, Algorithm 1) for one tensor, in float64."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from tests.reference.base import (
    ADAMS_MOMENTS,
    Options,
    State,
    Update,
    Values,
    advance,
    early_decay,
    enter,
    leave,
)

DEFAULTS = Options(weight_decay=0.0, adam_w_mode=False)

STATES = ADAMS_MOMENTS


def step(p: Values, g: ArrayLike, state: State, o: Options) -> Update:
    """theta <- theta - lr * m_hat / (sqrt(v_hat) + eps).

    Weight decay is the gradient of (wd / 2) |theta|^2 unless `adam_w_mode`, which shrinks
    theta by 1 - lr * wd before the step instead.
    """
    start = enter(p, g, state, o)
    shrunk, grad = start.theta, start.grad
    with np.errstate(all="ignore"):
        if early_decay(o):
            shrunk = shrunk * (1 - o.lr * early_decay(o))
        elif o.weight_decay and not o.adam_w_mode:
            grad = grad + start.theta * o.weight_decay
        e = advance(grad, state, o)
        new = shrunk - (e.m_hat * o.lr) / (e.v_hat.sqrt() + o.eps)
    return leave(start, state, o, e.kept, new)
