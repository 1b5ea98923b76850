"""AdEMAMix (Pagliardini et al. 2024, arXiv 2409.03137, Algorithm 1) for one tensor, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from tests.reference.base import Options, State, Update, Values, enter, leave, stepped, with_decay
from tests.reference.facts import Facts, flip
from tests.reference.tracked import Tracked


@dataclass(frozen=True)
class AdEMAMixOptions(Options):
    """Those of the slow average beside all others."""

    betas: tuple[float, ...] = (0.9, 0.999, 0.9999)
    adam_w_mode: bool = True  # decay apart from the gradient
    alpha: float = 5.0
    t_alpha: int | None = None
    t_beta3: int | None = None


DEFAULTS = AdEMAMixOptions()
STATES = {"exp_avg": True, "exp_avg_slow": True, "exp_avg_sq": False}
FACTS = Facts(
    flips={
        "betas": [
            flip((0.8, 0.999, 0.9999)),
            flip((0.9, 0.97, 0.9999)),
            flip((0.9, 0.999, 0.99), optim_bits=8),
        ],
        "alpha": [flip(2.0), flip(0.0, optim_bits=8)],
        "t_alpha": [flip(10), flip(10, optim_bits=8)],
        "t_beta3": [flip(10), flip(10, optim_bits=8)],
    },
    refused={
        "t_alpha": [flip(10, alpha=0.0)],
        "t_beta3": [
            flip(10, alpha=0.0),
            flip(10, betas=(0.0, 0.999, 0.9999)),
            flip(10, betas=(0.9, 0.999, 0.5)),
        ],
    },
    variants={
        "betas": {"betas": (0.0, 0.5, 0.9), "eps": 1e-3, "weight_decay": 0.1},
        "small_8bit": {"min_8bit_size": 1, "betas": (0.95, 0.98, 0.99)},
        "schedules": {"t_alpha": 3, "t_beta3": 4, "alpha": 8.0},
    },
    peak_lr=1e-3,
)


def _scheduled(o: AdEMAMixOptions, t: int) -> tuple[float, float]:
    """alpha(t) and beta3(t) of Algorithm 1's warm-ups, Equations in section 3."""
    beta1, _, beta3 = o.betas
    alpha = o.alpha if o.t_alpha is None else min(t * o.alpha / o.t_alpha, o.alpha)
    if o.t_beta3 is None or t >= o.t_beta3:
        return alpha, beta3
    share = t / o.t_beta3
    below = (1 - share) * np.log(beta3) + share * np.log(beta1)
    return alpha, min(float(np.exp(np.log(beta1) * np.log(beta3) / below)), beta3)


def step(p: Values, g: ArrayLike, state: State, o: AdEMAMixOptions) -> Update:
    """m1 <- beta1 * m1 + (1 - beta1) * g, m2 <- beta3(t) * m2 + (1 - beta3(t)) * g;
    theta <- theta - lr * ((m1_hat + alpha(t) * m2) / (sqrt(v_hat) + eps) + wd * theta).
    """
    start, (beta1, beta2, _), t = enter(p, g, state, o), o.betas, state.step + 1
    grad = with_decay(start, o)
    alpha, beta3 = _scheduled(o, t)
    before = {name: Tracked.exact(moment) for name, moment in state.moments.items()}
    with np.errstate(all="ignore"):
        fast = (before["exp_avg"] * beta1 + grad * (1 - beta1)).saturated()
        slow = (before["exp_avg_slow"] * beta3 + grad * (1 - beta3)).saturated()
        v = (before["exp_avg_sq"] * beta2 + (grad * (1 - beta2)) * grad).saturated()
        mixed = fast / (1 - beta1**t) + slow * alpha
        new = stepped(start, o, mixed / ((v / (1 - beta2**t)).sqrt() + o.eps), o.lr)
    return leave(start, state, o, {"exp_avg": fast, "exp_avg_slow": slow, "exp_avg_sq": v}, new)
