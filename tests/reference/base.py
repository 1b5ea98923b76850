"""What the references share: options, state, what enters a rule and the result of one step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tests.reference.clipping import clip
from tests.reference.tracked import Tracked

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Values = ArrayLike | Tracked


@dataclass(frozen=True)
class Options:
    """Hyperparameters of one step, by the names that the configuration gives them."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    maximize: bool = False
    bias_correction: bool = True
    adam_w_mode: bool = False
    amsgrad: bool = False
    trust_ratio: str = "lamb"
    max_unorm: float | None = None
    trust_ratio_bounds: tuple[float, float] | None = None
    always_adapt: bool = True
    percentile_clipping: int = 100
    block_wise: bool = True
    signed_map: str = "dynamic"
    second_moment_floor: bool = True
    skip_zeros: bool = False
    nonfinite: str = "propagate"
    param_rounding: str = "nearest"
    seed: int = 0
    compat: str = "none"

    @property
    def bitsandbytes(self) -> bool:
        """Whether bitsandbytes' CUDA kernels are to be followed where they differ."""
        return self.compat == "bitsandbytes"


@dataclass(frozen=True)
class State:
    """Moments after `step` steps, as float64 arrays of the parameter's shape."""

    step: int
    m: Array
    v: Array
    vmax: Array
    gnorm_vec: Array | None = None

    @staticmethod
    def zeros(shape: tuple[int, ...]) -> State:
        """The state before the first step."""
        return State(0, np.zeros(shape), np.zeros(shape), np.zeros(shape), np.zeros(100))


@dataclass(frozen=True)
class Update:
    """New parameter and moments with their float32 error bounds, and LAMB's ratio.

    `late_decay` is a factor for the parameter once it is rounded to its dtype (bitsandbytes).
    """

    p: Tracked
    m: Tracked
    v: Tracked
    vmax: Tracked
    step: int
    ratio: float = 1.0
    gnorm_vec: Array | None = None
    late_decay: Array | None = None

    def state(self) -> State:
        """The state from which a free-running reference goes on."""
        return State(self.step, self.m.value, self.v.value, self.vmax.value, self.gnorm_vec)


Step = Callable[[Values, ArrayLike, State, Options], Update]


@dataclass(frozen=True)
class Moments:
    """Moments after one gradient and, with them, the bias-corrected estimates."""

    m: Tracked
    v: Tracked
    vmax: Tracked
    m_hat: Tracked
    v_hat: Tracked


@dataclass(frozen=True)
class Entry:
    """What enters a rule: the parameter, the clipped gradient, and which elements stay out."""

    theta: Tracked
    grad: Tracked
    held: Mask
    gnorm_vec: Array | None


def enter(p: Values, g: ArrayLike, state: State, o: Options) -> Entry:
    """Clips the gradient by the norms seen so far and finds the elements to leave alone.

    Both look at the gradient as it came.
    """
    raw = np.asarray(g, dtype=np.float64)
    held = np.zeros(raw.shape, dtype=bool)
    if o.skip_zeros:
        held |= raw == 0
    if o.nonfinite == "skip_element":
        held |= ~np.isfinite(raw)
    grad, history = Tracked.exact(raw), state.gnorm_vec
    if o.percentile_clipping < 100:
        assert history is not None
        history, scale = clip(raw, history, state.step + 1, o.percentile_clipping)
        with np.errstate(all="ignore"):
            grad = grad * scale if scale.value < 1 or scale.error.any() else grad
    grad = grad * Tracked.exact(-1.0) if o.maximize else grad
    return Entry(Tracked.exact(p), grad, held, history)


def leave(
    entry: Entry, state: State, o: Options, e: Moments, new: Tracked, ratio: float = 1.0
) -> Update:
    """The update with the held elements as they were."""

    def kept(before: Values, after: Tracked) -> Tracked:
        return Tracked.choose(entry.held, Tracked.exact(before), after)

    late = None
    if o.bitsandbytes and o.weight_decay and o.adam_w_mode:
        late = np.where(entry.held, 1.0, 1 - o.lr * o.weight_decay)
    return Update(
        kept(entry.theta, new), kept(state.m, e.m), kept(state.v, e.v), kept(state.vmax, e.vmax),
        state.step + 1, ratio, entry.gnorm_vec, late,
    )  # fmt: skip


def early_decay(o: Options) -> float:
    """The decoupled weight decay that shrinks a parameter before its step."""
    return o.weight_decay if o.adam_w_mode and not o.bitsandbytes else 0.0


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
