"""Adam (Kingma & Ba 2015, arXiv 1412.6980, Algorithm 1) for one tensor, in float64."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from tests.reference.base import Options, State, Update, advance
from tests.reference.tracked import Tracked

DEFAULTS = Options(weight_decay=0.0, adam_w_mode=False)


def step(p: ArrayLike, g: ArrayLike, state: State, o: Options) -> Update:
    """theta <- theta - lr * m_hat / (sqrt(v_hat) + eps).

    Weight decay is the gradient of (wd / 2) |theta|^2 unless `adam_w_mode`, which shrinks
    theta by 1 - lr * wd before the step instead.
    """
    theta, grad = Tracked.exact(p), Tracked.exact(g)
    with np.errstate(all="ignore"):
        shrunk = theta
        if o.weight_decay and o.adam_w_mode:
            shrunk = theta * (1 - o.lr * o.weight_decay)
        elif o.weight_decay:
            grad = grad + theta * o.weight_decay
        e = advance(grad, state, o)
        new = shrunk - (e.m_hat * o.lr) / (e.v_hat.sqrt() + o.eps)
    return Update(new, e.m, e.v, e.vmax, state.step + 1)
