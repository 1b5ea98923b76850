"""ADOPT (Taniguchi et al. 2024, arXiv 2411.02853, Algorithm 2) for one tensor, in float64."""

from __future__ import annotations

from dataclasses import replace

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

DEFAULTS = Options(betas=(0.9, 0.9999), eps=1e-6)
STATES = ADAMS_MOMENTS
FACTS = Facts(
    flips={
        # The first gradient moves nothing.
        "betas": [flip((0.8, 0.9999)), flip((0.9, 0.97)), flip((0.0, 0.9999), optim_bits=8)],
        "eps": [flip(1e-1), flip(1e-1, optim_bits=8)],
        "decoupled_weight_decay": [
            flip(True, weight_decay=0.1),
            flip(True, weight_decay=0.1, optim_bits=8),
        ],
    },
    variants={
        "coupled": {"weight_decay": 0.1, "eps": 1e-2},
        "apart": {"weight_decay": 0.1, "decoupled_weight_decay": True},
    },
    peak_lr=3e-3,
    longest_step=300**0.25,  # the last step's clipping
)


def step(p: Values, g: ArrayLike, state: State, o: Options) -> Update:
    """v_0 = g_0^2; then m <- beta1 * m + (1 - beta1) * clip(g / max(sqrt(v), eps), t^(1/4)),
    theta <- theta - lr * m, v <- beta2 * v + (1 - beta2) * g^2, for t = 1, 2 ...
    """
    t, (beta1, beta2) = state.step, o.betas
    start = enter(p, g, state, o)
    grad = with_decay(start, o)
    before = {name: Tracked.exact(moment) for name, moment in state.moments.items()}
    m, v = before["exp_avg"], before["exp_avg_sq"]
    with np.errstate(all="ignore"):
        if t == 0:
            kept = {"exp_avg": m, "exp_avg_sq": (grad * grad).saturated()}
            return leave(start, state, replace(o, weight_decay=0.0), kept, start.theta)
        scaled = grad / v.sqrt().maximum(Tracked.of(o.eps))
        m = (m * beta1 + _clipped(scaled, t**0.25) * (1 - beta1)).saturated()
        v = (v * beta2 + (grad * (1 - beta2)) * grad).saturated()
        new = stepped(start, o, m, o.lr)
    return leave(start, state, o, {"exp_avg": m, "exp_avg_sq": v}, new)


def _clipped(x: Tracked, limit: float) -> Tracked:
    """x within -limit and limit; an element beyond is the limit itself, however x was rounded."""
    bound = Tracked.of(limit)
    inside = -(-x.maximum(-bound)).maximum(-bound)
    beyond = np.abs(x.value) - x.error > bound.value + bound.error
    return Tracked.choose(beyond, bound * Tracked.exact(np.sign(x.value)), inside)
