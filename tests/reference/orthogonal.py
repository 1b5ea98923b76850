"""Muon's direction in float64, by a singular value decomposition."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Triple = tuple[float, float, float]


def polynomials(values: np.ndarray, steps: Sequence[Triple]) -> np.ndarray:
    """What successive steps make of singular values."""
    for a, b, c in steps:
        values = a * values + b * values**3 + c * values**5
    return values


def orthogonalized(x: np.ndarray, steps: Sequence[Triple], eps: float = 1e-7) -> np.ndarray:
    """U diag(p(s)) V^T of a matrix U diag(s) V^T |X|_F, smaller norms counting as eps."""
    x = x.astype(np.float64)
    u, s, vt = np.linalg.svd(x / max(float(np.linalg.norm(x)), eps), full_matrices=False)
    return (u * polynomials(s, steps)) @ vt
