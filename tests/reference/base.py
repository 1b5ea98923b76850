"""What the references share: options, state, and the result of one step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tests.reference.tracked import Tracked

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Options:
    """Hyperparameters of one step, by the names that the configuration gives them."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    bias_correction: bool = True
    adam_w_mode: bool = False
    amsgrad: bool = False
    trust_ratio: str = "lamb"
    max_unorm: float | None = None


@dataclass(frozen=True)
class State:
    """Moments after `step` steps, as float64 arrays of the parameter's shape."""

    step: int
    m: Array
    v: Array
    vmax: Array

    @staticmethod
    def zeros(shape: tuple[int, ...]) -> State:
        """The state before the first step."""
        return State(0, np.zeros(shape), np.zeros(shape), np.zeros(shape))


@dataclass(frozen=True)
class Update:
    """New parameter and moments with their float32 error bounds, and LAMB's ratio."""

    p: Tracked
    m: Tracked
    v: Tracked
    vmax: Tracked
    step: int
    ratio: float = 1.0

    def state(self) -> State:
        """The state from which a free-running reference goes on."""
        return State(self.step, self.m.value, self.v.value, self.vmax.value)


Step = Callable[[ArrayLike, ArrayLike, State, Options], Update]


@dataclass(frozen=True)
class Moments:
    """Moments after one gradient and, with them, the bias-corrected estimates."""

    m: Tracked
    v: Tracked
    vmax: Tracked
    m_hat: Tracked
    v_hat: Tracked


def advance(g: Tracked, state: State, o: Options) -> Moments:
    """One step of both moving averages (Kingma & Ba 2015, Algorithm 1, lines 5 to 8).

    With amsgrad (Reddi et al. 2018, as torch computes it) the running maximum is taken
    over the uncorrected second moment and corrected with the current step's factor.
    """
    beta1, beta2 = o.betas
    t = state.step + 1
    with np.errstate(all="ignore"):
        m = (Tracked.exact(state.m) * beta1 + g * (1 - beta1)).saturated()
        v = (Tracked.exact(state.v) * beta2 + (g * (1 - beta2)) * g).saturated()
        vmax = Tracked.exact(state.vmax).maximum(v)
        top = vmax if o.amsgrad else v
        if not o.bias_correction:
            return Moments(m, v, vmax, m, top)
        return Moments(m, v, vmax, m / (1 - beta1**t), top / (1 - beta2**t))
