"""LAMB (You et al. 2020, arXiv 1904.00962, Algorithm 2) for one tensor, in float64."""

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
    masked,
    stepped,
)
from tests.reference.facts import Facts
from tests.reference.tracked import Tracked

DEFAULTS = Options(eps=1e-6, weight_decay=0.01, adam_w_mode=True, trust_ratio="lamb")

STATES = ADAMS_MOMENTS
FACTS = Facts(peak_lr=1e-2)  # shares of a norm


def step(p: Values, g: ArrayLike, state: State, o: Options) -> Update:
    """theta <- theta - lr * ratio * u, with r = m_hat / (sqrt(v_hat) + eps).

    trust_ratio 'lamb': u = r + wd * theta, ratio = |theta| / |u|.
    trust_ratio 'clip': u = r, ratio = min(1, max_unorm * |theta| / |u|), theta shrunk by
    1 - lr * wd first; max_unorm 0 takes ratio 1 always, none given means 1.
    In both the ratio is 1 if either norm is zero, and `adam_w_mode` off puts the decay
    into the gradient instead. A held element's u counts as 0.
    """
    if o.trust_ratio not in ("lamb", "clip", "none"):
        raise ValueError(f"trust_ratio {o.trust_ratio!r} has no reference")
    start = enter(p, g, state, o)
    theta, grad = start.theta, start.grad
    with np.errstate(all="ignore"):
        if o.weight_decay and not o.adam_w_mode:
            grad = grad + theta * o.weight_decay
        e = advance(grad, state, o)
        u = e.m_hat / (e.v_hat.sqrt() + o.eps)
        decay, left = early_decay(o), None
        if o.trust_ratio == "lamb":
            u, left = u + theta * decay if decay else u, 1.0
        u = Tracked.choose(start.held, 0.0, u)
        ratio = trust_ratio(theta, masked(start, o, u), o, 1.0)
        new = stepped(start, o, u, o.lr if ratio is None else ratio * o.lr, left)
    taken = 1.0 if ratio is None else float(ratio.value)
    return leave(start, state, o, e.kept, new, taken)


def trust_ratio(theta: Tracked, u: Tracked, o: Options, limit: float) -> Tracked | None:
    """The trust ratio within its bounds; None, i.e. exactly 1 and unbounded, if there is none.

    `limit` stands for a max_unorm that was not given. There is no ratio unless both norms are
    positive: a NaN norm takes 1, as in timm and apex, and harms no finite element. bitsandbytes
    gives a tensor of norm zero the ratio 0.
    """
    limit = limit if o.max_unorm is None else o.max_unorm
    off = o.trust_ratio == "none" or (o.trust_ratio == "clip" and limit == 0)
    if off or (o.weight_decay == 0 and not o.always_adapt):
        return None
    top, bottom = theta.norm(), u.norm()
    if o.bitsandbytes and top.value == 0 and bottom.value > 0:
        return Tracked.exact(0.0)
    if not (top.value > 0 and bottom.value > 0):
        return None
    ratio = top / bottom
    if o.trust_ratio == "clip":
        ratio = ratio * limit
        ratio = Tracked.exact(1.0) if ratio.value > 1 else ratio
    return bounded(ratio, o)


def bounded(ratio: Tracked, o: Options) -> Tracked:
    """A ratio within its bounds."""
    if o.trust_ratio_bounds is None:
        return ratio
    low, high = o.trust_ratio_bounds
    if ratio.value < low:
        return Tracked.of(low)
    return Tracked.of(high) if ratio.value > high else ratio
