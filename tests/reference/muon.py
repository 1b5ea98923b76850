"""Muon as torch.optim.Muon documents it, for one tensor, in float64.

The direction is made of singular values, and not by products of matrices
(Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod, sqrt

import numpy as np
from numpy.typing import ArrayLike

from tests.reference.base import Array, Options, State, Update, Values, enter, leave, stepped
from tests.reference.facts import Facts, Flip, flip
from tests.reference.orthogonal import Triple, orthogonalized, polynomials
from tests.reference.tracked import FLOAT32_OVERFLOW, UNIT, Tracked

SETS = {"muon": ((3.4445, -4.7750, 2.0315),)}
CUBIC = (1.5, -0.5, 0.0)  # Newton's own, which converges slowly


@dataclass(frozen=True)
class MuonOptions(Options):
    """Those of the momentum and of matrices beside all others."""

    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5
    ns_coefficients: str | Sequence[Triple] = "muon"
    ns_dtype: str = "auto"
    ns_memory: int | None = None
    adjust_lr: str = "match_rms_adamw"
    split: int = 1
    flatten: bool = False
    neuron_norm: bool = False  # compared in tests/muon/test_neurons.py
    neuron_beta: float = 0.95


DEFAULTS = MuonOptions(weight_decay=0.1, eps=1e-7, adam_w_mode=True)
STATES = {"momentum_buffer": True}
FACTS = Facts(
    flips={
        "momentum": [flip(0.5), flip(0.0), flip(0.5, optim_bits=8)],
        "nesterov": [flip(False), flip(False, optim_bits=8)],
        "eps": [flip(1e3), flip(1e3, optim_bits=8)],  # beyond the gradient's norm
        "ns_steps": [flip(4), flip(6, optim_bits=8)],
        "ns_coefficients": [flip("you"), flip("polar_express"), flip((CUBIC,), optim_bits=8)],
        "ns_dtype": [flip("bfloat16")],
        # It changes memory alone: tests/muon/test_memory.py.
        "ns_memory": [],
        "adjust_lr": [flip("original"), flip("original", optim_bits=8)],
        "split": [flip(2), flip(2, optim_bits=8)],
        "flatten": [flip(True)],
        "neuron_norm": [flip(True), flip(True, optim_bits=8)],
        "neuron_beta": [
            flip(0.5, neuron_norm=True),
            flip(0.0, neuron_norm=True, optim_bits=8),
        ],
        "nonfinite": [Flip("skip_step", {}, spoiled=True)],
        # Elements of a matrix do not stand for themselves, and bitsandbytes has no Muon.
        "skip_zeros": [],
        "cautious": [],
        "compat": [],
    },
    refused={
        "ns_steps": [flip(0), flip(100), flip(6, ns_coefficients="you")],
        "ns_coefficients": [flip("moun"), flip((CUBIC, CUBIC)), flip(((3.4, 4.8, 2.0),))],
        "nonfinite": [flip("skip_element")],
        "neuron_beta": [flip(0.5), flip(1.0, neuron_norm=True)],
        "skip_zeros": [flip(True)],
        "cautious": [flip(True)],
        "compat": [flip("bitsandbytes")],
        "cautious_weight_decay": [],  # decay always stands apart
    },
    variants={
        "momentum": {"momentum": 0.5, "nesterov": False, "lr": 0.01},
        "original": {"adjust_lr": "original", "weight_decay": 0.0, "lr": 0.1},
        "cubic": {"ns_steps": 3, "ns_coefficients": (CUBIC,)},
        "triples": {"ns_steps": 2, "ns_coefficients": (CUBIC, (2.0, -1.5, 0.5))},
        "least_norm": {"eps": 1e3, "lr": 1.0},
    },
    longest_step=5.0,  # 0.2 sqrt(400) times a singular value, none of which is beyond 1.21
)


def step(p: Values, g: ArrayLike, state: State, o: MuonOptions) -> Update:
    """B <- mu B + (1 - mu) g; theta <- theta (1 - lr wd) - lr f O(B), O of each matrix.

    With nesterov O is of mu B + (1 - mu) g. f is 0.2 sqrt(max(rows, cols)), or with `original`
    sqrt(max(1, rows / cols)).
    """
    start = enter(p, g, state, o)
    before = Tracked.exact(state.moments["momentum_buffer"])
    with np.errstate(all="ignore"):
        b = (before * o.momentum + start.grad * (1 - o.momentum)).saturated()
        u = b
        if o.nesterov:
            u = (b * o.momentum + start.grad * (1 - o.momentum)).saturated()
        new = stepped(start, o, _directions(u, o), o.lr)
    return leave(start, state, o, {"momentum_buffer": b}, new)


def _directions(u: Tracked, o: MuonOptions) -> Tracked:
    """What is made of each matrix, times what its shape asks for."""
    shape = u.value.shape
    if o.flatten:
        shape = (shape[0], prod(shape[1:]))
    rows, cols = shape[-2] // o.split, shape[-1]
    factor = 0.2 * sqrt(max(rows, cols))
    if o.adjust_lr == "original":
        factor = sqrt(max(1.0, rows / cols))
    parts = zip(u.value.reshape(-1, rows, cols), u.error.reshape(-1, rows, cols), strict=True)
    made = [_orthogonal(Tracked(x, error), o) for x, error in parts]
    value = np.stack([one.value for one in made]).reshape(u.value.shape)
    error = np.stack([one.error for one in made]).reshape(u.value.shape)
    return Tracked(value, error) * factor


def _orthogonal(x: Tracked, o: MuonOptions) -> Tracked:
    """A matrix with its singular values taken through the polynomials.

    Errors grow as the polynomials' steepest slope has it. One element that is not finite spoils
    the matrix, and nothing is left of one whose squares overflow in float32.
    """
    if not np.isfinite(x.value).all():
        return Tracked.exact(np.full(x.value.shape, np.nan))
    norm = max(float(np.linalg.norm(x.value)), o.eps)
    if norm >= sqrt(FLOAT32_OVERFLOW) or not x.value.any():
        return Tracked.exact(np.zeros(x.value.shape))
    triples = SETS.get(o.ns_coefficients, ()) or o.ns_coefficients  # type: ignore[call-overload]
    steps = tuple(triples) * (o.ns_steps if len(triples) == 1 else 1)
    given = float(np.linalg.norm(x.error)) / norm
    off = _slope(steps) * (given + len(steps) * UNIT)
    value = orthogonalized(x.value, steps, o.eps)
    return Tracked(value, np.full(value.shape, off))


def _slope(steps: Sequence[Triple]) -> float:
    """The steepest slope of the composed polynomials in [0, 1], which is often that at 0."""
    values: Array = np.linspace(0.0, 1.0, 4001)
    return float(np.abs(np.diff(polynomials(values, steps)) / np.diff(values)).max())
