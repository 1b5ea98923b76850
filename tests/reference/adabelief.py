"""AdaBelief (Zhuang et al. 2020, arXiv 2010.07468, Algorithm 2) for one tensor, in float64."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from tests.reference.base import Options, State, Update, Values, enter, leave, stepped, with_decay
from tests.reference.facts import Facts, flip
from tests.reference.tracked import Tracked

DEFAULTS = Options(eps=1e-16, adam_w_mode=True)  # decay apart from the gradient
STATES = {"exp_avg": True, "exp_avg_var": False}
FACTS = Facts(
    flips={"eps": [flip(1e-3), flip(1e-2, optim_bits=8)]},
    peak_lr=3e-3,
    # Gradients alike are no surprise: 9.04 after 300 of them at 32 bits. At 8 bits the momentum is
    # off by up to a code, by whose square the variance is: 14.4.
    longest_step=15.0,
)


def step(p: Values, g: ArrayLike, state: State, o: Options) -> Update:
    """s <- beta2 * s + (1 - beta2) * (g - m)^2 + eps, with m <- beta1 * m + (1 - beta1) * g;
    theta <- theta - lr * m_hat / (sqrt(s_hat) + eps), after the decoupled decay.
    """
    start, (beta1, beta2), t = enter(p, g, state, o), o.betas, state.step + 1
    grad = with_decay(start, o)
    before = {name: Tracked.exact(moment) for name, moment in state.moments.items()}
    with np.errstate(all="ignore"):
        m = (before["exp_avg"] * beta1 + grad * (1 - beta1)).saturated()
        off = grad - m
        s = (before["exp_avg_var"] * beta2 + (off * (1 - beta2)) * off + o.eps).saturated()
        m_hat, s_hat = m / (1 - beta1**t), s / (1 - beta2**t)
        new = stepped(start, o, m_hat / (s_hat.sqrt() + o.eps), o.lr)
    return leave(start, state, o, {"exp_avg": m, "exp_avg_var": s}, new)
