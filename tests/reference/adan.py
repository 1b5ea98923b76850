"""Adan (Xie et al. 2022, arXiv 2208.06677, Algorithm 1) for one tensor, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from tests.reference.base import Options, State, Update, Values, enter, leave, stepped
from tests.reference.facts import Facts, flip
from tests.reference.tracked import Tracked


@dataclass(frozen=True)
class AdanOptions(Options):
    """Its betas and how it decays."""

    betas: tuple[float, ...] = (0.98, 0.92, 0.99)
    adam_w_mode: bool = True  # decay apart from the gradient

    @property
    def shrinking(self) -> float:
        """The proximal step of the decay."""
        return 1 / (1 + self.lr * self.weight_decay)


DEFAULTS = AdanOptions()
STATES = {"exp_avg": True, "exp_avg_diff": True, "exp_avg_sq": False, "previous_grad": True}
FACTS = Facts(
    flips={
        "betas": [
            flip((0.9, 0.92, 0.99)),
            flip((0.98, 0.5, 0.99), optim_bits=8),
            flip((0.98, 0.92, 0.9)),
        ],
    },
    variants={
        "betas": {"betas": (0.0, 0.5, 0.9), "eps": 1e-3, "weight_decay": 0.1},
        "small_8bit": {"min_8bit_size": 1, "betas": (0.9, 0.95, 0.98)},
    },
    peak_lr=3e-3,
)


def step(p: Values, g: ArrayLike, state: State, o: AdanOptions) -> Update:
    """m <- beta1 * m + (1 - beta1) * g, d <- beta2 * d + (1 - beta2) * (g - g_before),
    n <- beta3 * n + (1 - beta3) * (g + beta2 * (g - g_before))^2;
    theta <- (theta - lr * (m_hat + beta2 * d_hat) / (sqrt(n_hat) + eps)) / (1 + lr * wd).
    """
    start, (beta1, beta2, beta3), t = enter(p, g, state, o), o.betas, state.step + 1
    before = {name: Tracked.exact(moment) for name, moment in state.moments.items()}
    grad = start.grad
    with np.errstate(all="ignore"):
        change = Tracked.exact(np.zeros_like(grad.value))  # at first
        if state.step:
            change = grad - before["previous_grad"]
        looked = grad + change * beta2
        m = (before["exp_avg"] * beta1 + grad * (1 - beta1)).saturated()
        d = (before["exp_avg_diff"] * beta2 + change * (1 - beta2)).saturated()
        n = (before["exp_avg_sq"] * beta3 + (looked * (1 - beta3)) * looked).saturated()
        ahead = m / (1 - beta1**t) + d * beta2 / (1 - beta2**t)
        shrinking = 1.0 if o.bitsandbytes else o.shrinking
        u = ahead / ((n / (1 - beta3**t)).sqrt() + o.eps)
        new = stepped(start, o, u, o.lr * shrinking, shrinking)
    kept = {"exp_avg": m, "exp_avg_diff": d, "exp_avg_sq": n, "previous_grad": grad}
    return leave(start, state, o, kept, new)
