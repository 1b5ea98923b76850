"""The 8-bit variant of any reference step: decode, step in float64, say what must be stored."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tests.reference import quantization as q
from tests.reference.base import Options, State, Step, Update
from tests.reference.tracked import UNIT, Tracked

Codes = NDArray[np.uint8]
Scales = NDArray[np.float32]


@dataclass(frozen=True)
class Quantized:
    """One state as it is stored: codes of the parameter's shape and the scales of its grid."""

    codes: Codes
    scales: Scales


@dataclass(frozen=True)
class Expected:
    """What a state must quantize to: the scales, and the codes under the scales stored.

    `slack` widens the float32 error bound of the value; 1 is the bound itself.
    """

    value: Tracked
    finite: NDArray[np.bool_]
    codec: q.Codec
    block_size: int

    def scales(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Scale of every block and the error that float32 arithmetic may make in it."""
        x = np.where(self.finite, self.value.value, 0.0)
        error = np.where(self.finite, self.value.error, 0.0)
        scales = q.block_scales(x, self.codec, self.finite, self.block_size)
        worst = q.block_maximum(error, x.shape, self.block_size)
        return scales, worst / np.float64(0.99) + 3 * UNIT * scales

    def codes(self, stored: Scales, slack: float = 2.0) -> tuple[Codes, Codes]:
        """Lowest and highest admissible code; they are equal off the decision boundaries."""
        x = np.where(self.finite, self.value.value, 0.0)
        error = np.where(self.finite, self.value.error, 0.0) + UNIT * np.abs(x)
        low, high = (
            q.codes_for(x + sign * slack * error, stored, self.codec, self.finite, self.block_size)
            for sign in (-1, 1)
        )
        return low, high


def step_8bit(
    step: Step,
    p: ArrayLike,
    g: ArrayLike,
    m: Quantized,
    v: Quantized,
    steps_done: int,
    options: Options,
    block_size: int = q.BLOCK,
) -> tuple[Update, Expected, Expected]:
    """One step from stored codes; the parameter takes the moments before they are rounded.

    An element of which one moment is not finite in float32 is left out of both scales and
    stored as the code of 0 in both.
    """
    decoded_m = q.decode32(m.codes, m.scales, q.SIGNED_CODEC, block_size).astype(np.float64)
    decoded_v = q.decode32(v.codes, v.scales, q.UNSIGNED_CODEC, block_size).astype(np.float64)
    state = State(steps_done, decoded_m, decoded_v, np.zeros_like(decoded_v))
    update = step(p, g, state, options)
    finite = q.finite32(update.m.value, update.v.value)
    return (
        update,
        Expected(update.m, finite, q.SIGNED_CODEC, block_size),
        Expected(update.v, finite, q.UNSIGNED_CODEC, block_size),
    )
