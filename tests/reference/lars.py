"""LARS (You, Gitman & Ginsburg 2017, arXiv 1708.03888, Algorithm 1) for one tensor, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from tests.reference.base import State, Update, Values, enter, leave, masked, stepped
from tests.reference.facts import Facts, flip
from tests.reference.lamb import bounded, trust_ratio
from tests.reference.sgd import FACTS as SGD
from tests.reference.sgd import SGDOptions
from tests.reference.tracked import Tracked


@dataclass(frozen=True)
class LarsOptions(SGDOptions):
    """Those of SGD, and the paper's eta."""

    trust_coefficient: float = 0.001


DEFAULTS = LarsOptions(lr=1.0, eps=0.0, trust_ratio="lars")
STATES = {"momentum_buffer": True}
CLIP = {"trust_ratio": "clip"}
FACTS = Facts(
    flips={
        **SGD.flips,
        "compat": [flip("bitsandbytes", optim_bits=8, **CLIP)],
        "trust_coefficient": [flip(0.01), flip(0.01, optim_bits=8)],
        "max_unorm": [
            flip(0.01, **CLIP),
            flip(0.01, optim_bits=8, **CLIP),
            flip(0.0, max_unorm=0.01, **CLIP),
        ],
        "trust_ratio_bounds": [
            flip((0.0, 1e-4)),
            flip((1.0, 2.0), optim_bits=8),
            flip((0.0, 1e-3), **CLIP),
            flip(None, trust_ratio_bounds=(0.0, 1e-4)),
        ],
    },
    refused={
        **SGD.refused,
        "trust_ratio": [flip("lars", compat="bitsandbytes")],
        "max_unorm": [flip(0.5)],
        "trust_coefficient": [flip(0.01, **CLIP)],
        "eps": [flip(1e-3, **CLIP)],
        "cautious": [flip(True), flip(True, compat="bitsandbytes", **CLIP)],
    },
    variants={
        **SGD.variants,
        "rate": {"trust_coefficient": 0.02, "eps": 0.5, "weight_decay": 0.1, "lr": 10.0},
        "clip_nesterov": {"nesterov": True, "max_unorm": 0.01, "weight_decay": 0.1, **CLIP},
        "clip_plain": {"momentum": 0.0, "max_unorm": 0.01, "optim_bits": 32, **CLIP},
    },
    longest_step=10.001,  # 1 / (1 - 0.9), of tensors that begin with zeros
)


def step(p: Values, g: ArrayLike, state: State, o: LarsOptions) -> Update:
    """b <- momentum * b + (1 - dampening) * rate * (g + wd * theta); theta <- theta - lr * b, with
    rate = eta * |theta| / (|g| + wd * |theta| + eps); without dampening at the first step.

    trust_ratio 'clip' has no rate, and the step is at most max_unorm * |theta| long, where 0.02 is
    meant if none is given. Both ratios are 1 if one of their norms is zero. bitsandbytes takes the
    step's length without this step's decay.
    """
    start = enter(p, g, state, o)
    theta, grad = start.theta, start.grad
    with np.errstate(all="ignore"):
        undecayed = _after(state, grad, o)
        rate = _rate(theta, Tracked.choose(start.held, 0.0, grad), o)
        if o.weight_decay:
            grad = grad + theta * o.weight_decay
        grad = grad if rate is None else grad * rate
        b = _after(state, grad, o)
        u = (grad + b * o.momentum).saturated() if o.nesterov else b
        measured = Tracked.choose(start.held, 0.0, undecayed if o.bitsandbytes else u)
        clips = o.trust_ratio == "clip"
        ratio = trust_ratio(theta, masked(start, o, measured), o, 0.02) if clips else None
        new = stepped(start, o, u, o.lr if ratio is None else ratio * o.lr)
    taken = 1.0 if ratio is None else float(ratio.value)
    return leave(start, state, o, {"momentum_buffer": b} if o.momentum else {}, new, taken)


def _after(state: State, grad: Tracked, o: LarsOptions) -> Tracked:
    """The momentum once it has taken a gradient; the first is taken whole."""
    if not (o.momentum and state.step):
        return grad.saturated()
    before = Tracked.exact(state.moments["momentum_buffer"])
    return (before * o.momentum + grad * (1 - o.dampening)).saturated()


def _rate(theta: Tracked, grad: Tracked, o: LarsOptions) -> Tracked | None:
    """The paper's local rate (Equation 6); None, i.e. 1, where there is none."""
    top, bottom = theta.norm(), grad.norm()
    if o.trust_ratio != "lars" or (o.weight_decay == 0 and not o.always_adapt):
        return None
    if not (top.value > 0 and bottom.value > 0):
        return None
    return bounded(top * o.trust_coefficient / (top * o.weight_decay + bottom + o.eps), o)
