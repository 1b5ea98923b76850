"""RAdam (Liu et al. 2020, arXiv 1908.03265, Alg. 2) as torch.optim.RAdam, in float64."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from tests.reference.base import (
    ADAMS_MOMENTS,
    Options,
    State,
    Update,
    Values,
    enter,
    leave,
    stepped,
    with_decay,
)
from tests.reference.facts import Facts, Flip, flip
from tests.reference.tracked import Tracked

DEFAULTS = Options()
STATES = ADAMS_MOMENTS
FACTS = Facts(
    flips={
        # No step adapts before the sixth.
        "eps": [Flip(1e-3, {}, steps=7), Flip(1e-2, {"optim_bits": 8}, steps=7)],
        "decoupled_weight_decay": [
            flip(True, weight_decay=0.1),
            flip(True, weight_decay=0.1, optim_bits=8),
        ],
    },
    variants={
        "coupled": {"weight_decay": 0.1, "betas": (0.5, 0.9)},
        "apart": {"weight_decay": 0.1, "decoupled_weight_decay": True},
        "never_adapts": {"betas": (0.9, 0.5)},
    },
    peak_lr=3e-3,
    torch_peer="RAdam",
    torch_cases=[
        {},
        {"betas": (0.8, 0.99), "eps": 1e-4, "weight_decay": 0.1},
        {"weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True},
        {"betas": (0.9, 0.5)},
    ],
)


def step(p: Values, g: ArrayLike, state: State, o: Options) -> Update:
    """rho_t = rho - 2 * t * beta2^t / (1 - beta2^t), with rho = 2 / (1 - beta2) - 1.

    If rho_t > 5: theta <- theta - lr * m_hat * r_t * sqrt(1 - beta2^t) / (sqrt(v) + eps), where r_t
    is the root of (rho_t - 4)(rho_t - 2) rho / ((rho - 4)(rho - 2) rho_t); else by lr * m_hat.
    """
    start, (beta1, beta2), t = enter(p, g, state, o), o.betas, state.step + 1
    before = {name: Tracked.exact(moment) for name, moment in state.moments.items()}
    rho = 2 / (1 - beta2) - 1
    rho_t = rho - 2 * t * beta2**t / (1 - beta2**t)
    with np.errstate(all="ignore"):
        grad = with_decay(start, o)
        m = (before["exp_avg"] * beta1 + grad * (1 - beta1)).saturated()
        v = (before["exp_avg_sq"] * beta2 + (grad * (1 - beta2)) * grad).saturated()
        m_hat = m / (1 - beta1**t)
        if rho_t > 5:
            r = np.sqrt((rho_t - 4) * (rho_t - 2) * rho / ((rho - 4) * (rho - 2) * rho_t))
            new = stepped(start, o, m_hat * (r * np.sqrt(1 - beta2**t)) / (v.sqrt() + o.eps), o.lr)
        else:
            new = stepped(start, o, m_hat, o.lr)
    return leave(start, state, o, {"exp_avg": m, "exp_avg_sq": v}, new)
