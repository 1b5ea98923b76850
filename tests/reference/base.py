"""What the references share: options, state, what enters a rule and the result of one step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tests.reference.clipping import clip
from tests.reference.tracked import UNIT, Tracked

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Values = ArrayLike | Tracked


@dataclass(frozen=True)
class Options:
    """Hyperparameters of one step, by the names that the configuration gives them.

    A family with others has a subclass.
    """

    lr: float = 1e-3
    betas: tuple[float, ...] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    maximize: bool = False
    bias_correction: bool = True
    adam_w_mode: bool = False
    decoupled_weight_decay: bool = False
    amsgrad: bool = False
    trust_ratio: str = "lamb"
    max_unorm: float | None = None
    trust_ratio_bounds: tuple[float, float] | None = None
    always_adapt: bool = True
    percentile_clipping: int = 100
    block_wise: bool = True
    signed_map: str = "dynamic"
    second_moment_floor: bool = True
    state_rounding: str = "nearest"
    skip_zeros: bool = False
    nonfinite: str = "propagate"
    param_rounding: str = "nearest"
    master_weights: str | None = None
    seed: int = 0
    cautious: bool = False
    cautious_weight_decay: bool = False
    compat: str = "none"
    width: str = "8bit"  # of states that are codes: `SMALL` in quantization.py has others

    @property
    def bitsandbytes(self) -> bool:
        """Whether bitsandbytes' CUDA kernels are to be followed where they differ."""
        return self.compat == "bitsandbytes"

    @property
    def storing(self) -> str:
        """How a 16-bit parameter is stored."""
        has_masters = self.master_weights in ("split", "fp32")
        return str(self.master_weights) if has_masters else self.param_rounding

    @property
    def decoupled(self) -> bool:
        """Whether the weight decay shrinks the parameter and is not in the gradient."""
        return self.adam_w_mode or self.decoupled_weight_decay

    @property
    def shrinking(self) -> float:
        """What is left of a parameter by decoupled weight decay."""
        return 1 - self.lr * self.weight_decay


# What a family keeps of each element by its name in state dicts, and whether it can be negative.
Signs = Mapping[str, bool]
ADAMS_MOMENTS: Signs = {"exp_avg": True, "exp_avg_sq": False}
ADAMS_MAXIMUM = "max_exp_avg_sq"


@dataclass(frozen=True)
class State:
    """Moments by name after `step` steps, as float64 arrays of the parameter's shape."""

    step: int
    moments: Mapping[str, Array]
    gnorm_vec: Array | None = None

    @staticmethod
    def zeros(shape: tuple[int, ...], names: Iterable[str] = ADAMS_MOMENTS) -> State:
        """The state before the first step."""
        return State(0, {name: np.zeros(shape) for name in names}, np.zeros(100))


@dataclass(frozen=True)
class Update:
    """New parameter and moments with their float32 error bounds, and LAMB's ratio.

    `late_decay` is a factor for the parameter once it is rounded to its dtype (bitsandbytes).
    """

    p: Tracked
    moments: Mapping[str, Tracked]
    step: int
    ratio: float = 1.0
    gnorm_vec: Array | None = None
    late_decay: Array | None = None

    def state(self) -> State:
        """The state from which a free-running reference goes on."""
        values = {name: moment.value for name, moment in self.moments.items()}
        return State(self.step, values, self.gnorm_vec)


Step = Callable[[Values, ArrayLike, State, Options], Update]


@dataclass(frozen=True)
class Moments:
    """Adam's moments after one gradient and, with them, the bias-corrected estimates."""

    kept: Mapping[str, Tracked]
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
    grad = -grad if o.maximize else grad
    return Entry(Tracked.exact(p), grad, held, history)


def leave(
    entry: Entry,
    state: State,
    o: Options,
    moments: Mapping[str, Tracked],
    new: Tracked,
    ratio: float = 1.0,
) -> Update:
    """The update with the held elements as they were."""

    def kept(before: Values, after: Tracked) -> Tracked:
        return Tracked.choose(entry.held, Tracked.exact(before), after)

    late = None
    if o.bitsandbytes and o.weight_decay and o.decoupled:
        late = np.where(entry.held, 1.0, o.shrinking)
    return Update(
        kept(entry.theta, new),
        {name: kept(state.moments[name], moment) for name, moment in moments.items()},
        state.step + 1,
        ratio,
        entry.gnorm_vec,
        late,
    )


def early_decay(o: Options) -> float:
    """The decoupled weight decay that shrinks a parameter before its step."""
    return o.weight_decay if o.decoupled and not o.bitsandbytes else 0.0


def with_decay(start: Entry, o: Options) -> Tracked:
    """The gradient, to which weight decay is added that is not decoupled."""
    if o.decoupled or not o.weight_decay:
        return start.grad
    return start.grad + start.theta * o.weight_decay


def stepped(
    start: Entry, o: Options, u: Tracked, size: float | Tracked, left: float | None = None
) -> Tracked:
    """theta <- left * theta - size * u, without what is left out cautiously.

    `left` is what decoupled decay leaves of a parameter: 1 - lr * wd if nothing else is said.
    """
    u = masked(start, o, u)
    factor = 1 - o.lr * early_decay(o) if left is None else left
    kept = start.theta if factor == 1 else start.theta * factor
    if o.cautious_weight_decay:
        kept = Tracked.choose(u.value * start.theta.value >= 0, kept, start.theta)
        unsure = (np.abs(u.value) <= 2 * u.error) & (u.error > 0)
        either = kept.error + np.abs(start.theta.value * (1 - factor))
        kept = Tracked(kept.value, np.where(unsure, either, kept.error))
    return kept - u * size


def masked(start: Entry, o: Options, u: Tracked) -> Tracked:
    """C-Optim's phi * u * d / (|phi|_0 + 1) with phi = 1[u * g > 0] (Liang et al. 2024, Alg. 1).

    Elements whose sign rounding errors may decide are counted, or not, and move, or not.
    """
    if not o.cautious:
        return u
    agrees = np.sign(u.value) * np.sign(start.grad.value) > 0
    unsure = (np.abs(u.value) <= 2 * u.error) & (start.grad.value != 0) & (u.error > 0)
    count = np.sum(agrees & ~start.held)
    share = np.asarray(u.value.size / (count + 1.0))
    doubt = np.sum(unsure & ~start.held) / (count + 1.0)
    phi = np.where(agrees, 1.0, 0.0)
    error = np.where(unsure, np.abs(u.value) + u.error, phi * u.error)
    return Tracked(phi * u.value, error) * Tracked(share, share * (doubt + UNIT))


def advance(g: Tracked, state: State, o: Options) -> Moments:
    """One step of both moving averages of Adam (Kingma & Ba 2015, Algorithm 1, lines 5 to 8).

    With amsgrad (Reddi et al. 2018, as torch computes it) the running maximum is taken
    over the uncorrected second moment and corrected with the current step's factor.
    """
    beta1, beta2 = o.betas
    t = state.step + 1
    with np.errstate(all="ignore"):
        before = {name: Tracked.exact(moment) for name, moment in state.moments.items()}
        m = (before["exp_avg"] * beta1 + g * (1 - beta1)).saturated()
        v = (before["exp_avg_sq"] * beta2 + (g * (1 - beta2)) * g).saturated()
        kept, top = {"exp_avg": m, "exp_avg_sq": v}, v
        if o.amsgrad:
            kept[ADAMS_MAXIMUM] = top = before[ADAMS_MAXIMUM].maximum(v)
        if not o.bias_correction:
            return Moments(kept, m, top)
        return Moments(kept, m / (1 - beta1**t), top / (1 - beta2**t))
