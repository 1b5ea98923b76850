"""NAdam as torch.optim.NAdam documents it (Dozat 2016, Algorithm 2), for one tensor, in float64."""

from __future__ import annotations

from dataclasses import dataclass

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
from tests.reference.facts import Facts, flip
from tests.reference.tracked import Tracked


@dataclass(frozen=True)
class NAdamOptions(Options):
    """That of the momentum's schedule beside all others."""

    lr: float = 2e-3
    momentum_decay: float = 4e-3


DEFAULTS = NAdamOptions()
STATES = ADAMS_MOMENTS
FACTS = Facts(
    flips={
        "momentum_decay": [flip(0.5), flip(0.0), flip(0.5, optim_bits=8)],
        "decoupled_weight_decay": [
            flip(True, weight_decay=0.1),
            flip(True, weight_decay=0.1, optim_bits=8),
        ],
    },
    variants={
        "coupled": {"weight_decay": 0.1, "momentum_decay": 0.5},
        "apart": {"weight_decay": 0.1, "decoupled_weight_decay": True},
        "constant": {"momentum_decay": 0.0},
    },
    peak_lr=3e-3,
    torch_peer="NAdam",
    torch_cases=[
        {},
        {"momentum_decay": 0.1, "betas": (0.8, 0.99), "weight_decay": 0.1, "eps": 1e-2},
        {"weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True},
        {"momentum_decay": 0.0, "eps": 1e-4},
    ],
)


def step(p: Values, g: ArrayLike, state: State, o: NAdamOptions) -> Update:
    """mu_t = beta1 * (1 - 0.96^(t * psi) / 2), with the product P_t of mu_1 to mu_t.

    m_hat = mu_(t+1) * m / (1 - P_(t+1)) + (1 - mu_t) * g / (1 - P_t), v_hat = v / (1 - beta2^t);
    theta <- theta - lr * m_hat / (sqrt(v_hat) + eps).
    """
    start, (beta1, beta2), t = enter(p, g, state, o), o.betas, state.step + 1
    mu = beta1 * (1 - 0.5 * 0.96 ** (np.arange(1.0, t + 2) * o.momentum_decay))
    before = {name: Tracked.exact(moment) for name, moment in state.moments.items()}
    with np.errstate(all="ignore"):
        grad = with_decay(start, o)
        m = (before["exp_avg"] * beta1 + grad * (1 - beta1)).saturated()
        v = (before["exp_avg_sq"] * beta2 + (grad * (1 - beta2)) * grad).saturated()
        ahead = m * (mu[t] / (1 - mu.prod())) + grad * ((1 - mu[t - 1]) / (1 - mu[:t].prod()))
        new = stepped(start, o, ahead / ((v / (1 - beta2**t)).sqrt() + o.eps), o.lr)
    return leave(start, state, o, {"exp_avg": m, "exp_avg_sq": v}, new)
