"""Percentile clipping of one tensor's gradient, from bitsandbytes' documented behaviour."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tests.reference.tracked import UNIT, Tracked

Array = NDArray[np.float64]

HISTORY = 100


def clip(g: Array, history: Array, step: int, percentile: int) -> tuple[Array, Tracked]:
    """The history with this gradient's squared norm in it, and the factor for the gradient.

    The first norm above 0 fills all 100 entries, step t writes entry t mod 100. The limit is the
    entry of zero-based rank `percentile`. A norm that is not finite is not noted and clips nothing.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        total = np.float64(np.float32(np.sum(g * g)))
    if not np.isfinite(total):
        return history, Tracked.exact(1.0)
    after = history.copy()
    if not history.any():
        after[:] = total
    after[step % HISTORY] = total
    norm, limit = np.sqrt(total), np.sqrt(np.sort(after)[percentile])
    if norm <= limit * (1 - 4 * UNIT) or norm == limit == 0:
        return after, Tracked.exact(1.0)
    scale = np.minimum(limit / norm, 1.0)
    # The sum of squares may end on a neighbouring float32; then two roots and a quotient.
    return after, Tracked(np.asarray(scale), np.asarray(4 * UNIT * scale))
