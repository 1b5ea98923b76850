"""The 8-bit variant of any reference step: decode, step in float64, say what must be stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tests.reference import quantization as q
from tests.reference.base import Options, Signs, State, Step, Update, Values
from tests.reference.tracked import TINY, UNIT, Tracked

Codes = NDArray[np.uint8]
Scales = NDArray[np.float32]


@dataclass(frozen=True)
class Quantized:
    """One state as it is stored: codes of the parameter's shape and the scales of its grid."""

    codes: Codes
    scales: Scales


@dataclass(frozen=True)
class Coding:
    """How one state is coded: its codec, the size of a block, and whether blocks cross rows."""

    codec: q.Codec
    block_size: int = q.BLOCK
    flat: bool = False
    random: bool = False

    @staticmethod
    def of(o: Options, signed: bool, shape: tuple[int, ...], block_size: int = q.BLOCK) -> Coding:
        """What the options ask for: tensor-wise quantization is one block of all elements."""
        signed_codec = q.SYMMETRIC_CODEC if o.signed_map == "symmetric" else q.SIGNED_CODEC
        floored = o.second_moment_floor and not o.bitsandbytes
        unsigned_codec = q.UNSIGNED_CODEC if floored else q.UNFLOORED_CODEC
        if o.bitsandbytes:
            signed_codec, unsigned_codec = q.COMPAT_SIGNED_CODEC, q.COMPAT_UNSIGNED_CODEC
        size = block_size if o.block_wise else int(np.prod(shape))
        if o.width in q.SMALL:
            return Coding(q.SMALL[o.width][signed][0], size, not o.block_wise, True)
        codec = signed_codec if signed else unsigned_codec
        flat = o.bitsandbytes or not o.block_wise
        return Coding(codec, size, flat, o.state_rounding == "stochastic" and not o.bitsandbytes)

    def seen(self, x: NDArray) -> NDArray:
        """The tensor as the grid of blocks sees it."""
        return x.reshape(-1) if self.flat else x

    def decode(self, state: Quantized) -> NDArray[np.float64]:
        """The state's values, in the codes' shape."""
        values = q.decode32(self.seen(state.codes), state.scales, self.codec, self.block_size)
        return values.astype(np.float64).reshape(state.codes.shape)


@dataclass(frozen=True)
class Expected:
    """What a state must quantize to: the scales, and the codes under the scales stored.

    `slack` widens the float32 error bound of the value; 1 is the bound itself.
    """

    value: Tracked
    finite: NDArray[np.bool_]
    coding: Coding

    def scales_shape(self) -> tuple[int, ...]:
        """The shape of the scales."""
        shape = self.coding.seen(self.value.value).shape
        return q.scales_shape(shape, self.coding.block_size)

    def _seen(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
        """Value and error, 0 where not finite, and the mask, as the grid of blocks sees them."""
        x = np.where(self.finite, self.value.value, 0.0)
        error = np.where(self.finite, self.value.error, 0.0)
        return self.coding.seen(x), self.coding.seen(error), self.coding.seen(self.finite)

    def scales(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Scale of every block and the error that float32 arithmetic may make in it."""
        x, error, finite = self._seen()
        scales = q.block_scales(x, self.coding.codec, finite, self.coding.block_size)
        worst = q.block_maximum(error, x.shape, self.coding.block_size)
        return scales, worst / np.float64(0.99) + 3 * (UNIT * scales + TINY)

    def codes(self, stored: Scales, slack: float = 2.0) -> tuple[Codes, Codes]:
        """Lowest and highest admissible code; they are equal off the decision boundaries.

        Where codes are rounded at random, both neighbours of a value are admissible.
        """
        x, error, finite = self._seen()
        error = np.where(finite, error, 0.0) + UNIT * np.abs(x)
        codec, size, shape = self.coding.codec, self.coding.block_size, self.value.value.shape
        off = slack * error + codec.margin * np.abs(x)
        one, other = (
            q.codes_for(x + sign * off, stored, codec, finite, size).reshape(shape)
            for sign in (-1, 1)
        )
        low, high = np.minimum(one, other), np.maximum(one, other)
        if self.coding.random:
            is_zero = (x == 0).reshape(shape)
            lowest = 1 if codec.floor else 0
            low, high = low.astype(np.int64), high.astype(np.int64)
            low = np.where(is_zero, low, np.maximum(low - 1, np.minimum(low, lowest)))
            high = np.where(is_zero, high, np.minimum(high + 1, len(codec.values) - 1))
        return low, high


def step_8bit(
    step: Step,
    p: Values,
    g: ArrayLike,
    stored: Mapping[str, Quantized],
    signs: Signs,
    state: State,
    options: Options,
    block_size: int = q.BLOCK,
) -> tuple[Update, dict[str, Expected]]:
    """One step from stored codes; the parameter takes the moments before they are rounded.

    Of `state` all but the moments counts. An element of which one moment is not finite in float32
    is left out of all scales and stored as the code of 0 in all.
    """
    codings = {
        name: Coding.of(options, signs[name], codes.codes.shape, block_size)
        for name, codes in stored.items()
    }
    before = replace(state, moments={name: codings[name].decode(stored[name]) for name in stored})
    if options.bitsandbytes and options.block_wise:
        update = _reset(step(p, g, before, replace(options, trust_ratio="none")), p, g)
    else:
        update = step(p, g, before, options)
    finite = q.finite32(*(moment.value for moment in update.moments.values()))
    return update, {
        name: Expected(moment, finite, codings[name]) for name, moment in update.moments.items()
    }


def _reset(update: Update, p: Values, g: ArrayLike) -> Update:
    """bitsandbytes' block-wise kernels forget an element whose gradient is not finite."""
    hurt = ~np.isfinite(np.asarray(g))
    late = update.late_decay
    return replace(
        update,
        p=Tracked.choose(hurt, Tracked.exact(p), update.p),
        moments={k: Tracked.choose(hurt, 0.0, moment) for k, moment in update.moments.items()},
        late_decay=None if late is None else np.where(hurt, 1.0, late),
    )
