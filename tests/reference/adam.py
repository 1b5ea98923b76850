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
    enter,
    leave,
    stepped,
    with_decay,
)

DEFAULTS = Options(weight_decay=0.0, adam_w_mode=False)

STATES = ADAMS_MOMENTS


def step(p: Values, g: ArrayLike, state: State, o: Options) -> Update:
    """theta <- theta - lr * m_hat / (sqrt(v_hat) + eps).

    Weight decay is the gradient of (wd / 2) |theta|^2 unless `adam_w_mode`, which shrinks
    theta by 1 - lr * wd before the step instead.
    """
    start = enter(p, g, state, o)
    with np.errstate(all="ignore"):
        e = advance(with_decay(start, o), state, o)
        new = stepped(start, o, e.m_hat / (e.v_hat.sqrt() + o.eps), o.lr)
    return leave(start, state, o, e.kept, new)
