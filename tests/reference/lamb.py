"""LAMB (You et al. 2020, arXiv 1904.00962, Algorithm 2) for one tensor, in float64."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from tests.reference.base import Options, State, Update, advance
from tests.reference.tracked import Tracked

DEFAULTS = Options(eps=1e-6, weight_decay=0.01, adam_w_mode=True, trust_ratio="lamb")


def _quotient(theta: Tracked, u: Tracked) -> Tracked | None:
    """|theta| / |u|, or None where it is not defined: unless both norms are positive.

    A NaN norm so takes ratio 1, as in timm and apex, and harms no finite element.
    """
    top, bottom = theta.norm(), u.norm()
    return top / bottom if top.value > 0 and bottom.value > 0 else None


def step(p: ArrayLike, g: ArrayLike, state: State, o: Options) -> Update:
    """theta <- theta - lr * ratio * u, with r = m_hat / (sqrt(v_hat) + eps).

    trust_ratio 'lamb': u = r + wd * theta, ratio = |theta| / |u|.
    trust_ratio 'clip': u = r, ratio = min(1, max_unorm * |theta| / |u|), theta shrunk by
    1 - lr * wd first; max_unorm 0 takes ratio 1 always, none given means 1.
    In both the ratio is 1 if either norm is zero, and `adam_w_mode` off puts the decay
    into the gradient instead.
    """
    theta, grad = Tracked.exact(p), Tracked.exact(g)
    with np.errstate(all="ignore"):
        if o.weight_decay and not o.adam_w_mode:
            grad = grad + theta * o.weight_decay
        e = advance(grad, state, o)
        u = e.m_hat / (e.v_hat.sqrt() + o.eps)
        shrunk, decay = theta, o.weight_decay if o.adam_w_mode else 0.0
        if o.trust_ratio == "lamb":
            u = u + theta * decay if decay else u
            ratio = _quotient(theta, u)
        elif o.trust_ratio == "clip":
            shrunk = theta * (1 - o.lr * decay) if decay else theta
            ratio = _clipped(_quotient(theta, u), o.max_unorm)
        else:
            raise ValueError(f"trust_ratio {o.trust_ratio!r} has no reference")
        new = shrunk - (u * o.lr if ratio is None else u * (ratio * o.lr))
    taken = 1.0 if ratio is None else float(ratio.value)
    return Update(new, e.m, e.v, e.vmax, state.step + 1, taken)


def _clipped(quotient: Tracked | None, max_unorm: float | None) -> Tracked | None:
    bound = 1.0 if max_unorm is None else max_unorm
    if quotient is None or bound == 0:
        return None
    scaled = quotient * bound
    return None if scaled.value > 1 else scaled
