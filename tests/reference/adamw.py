"""AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101, Algorithm 2) for one tensor, in float64."""

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

DEFAULTS = Options(weight_decay=0.01, adam_w_mode=True)

STATES = ADAMS_MOMENTS


def step(p: Values, g: ArrayLike, state: State, o: Options) -> Update:
    """theta <- theta - lr * wd * theta - lr * m_hat / (sqrt(v_hat) + eps).

    The paper's schedule multiplier is 1 and its decay is scaled by lr, as torch does.
    `adam_w_mode` off is the paper's line 6 with L2 regularisation in the gradient.
    """
    start = enter(p, g, state, o)
    with np.errstate(all="ignore"):
        e = advance(with_decay(start, o), state, o)
        # An infinite theta must stay infinite, so the decay is a factor and no difference.
        new = stepped(start, o, e.m_hat / (e.v_hat.sqrt() + o.eps), o.lr)
    return leave(start, state, o, e.kept, new)
