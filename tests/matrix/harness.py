"""Matrices of chosen spectra, and bounds on results."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from optfactory.matrix.coefficients import steps_of
from optfactory.matrix.orthogonalize import Orthogonalization
from tests.reference.orthogonal import orthogonalized

MUON = Orthogonalization(steps_of("muon", 5))
POLAR_EXPRESS = Orthogonalization(steps_of("polar_express", 8))
ROUNDED = Orthogonalization(steps_of("muon", 5), dtype=torch.bfloat16)

SHAPES = [(1, 1), (1, 40), (40, 1), (2, 3), (17, 33), (33, 17), (64, 64), (48, 160), (160, 48)]


def matrix(rows: int, cols: int, values: np.ndarray | None = None, seed: int = 0) -> np.ndarray:
    """A random matrix, of these singular values if any are given."""
    random = np.random.default_rng(seed)
    if values is None:
        return random.standard_normal((rows, cols))
    count = len(values)
    u, _ = np.linalg.qr(random.standard_normal((rows, count)))
    v, _ = np.linalg.qr(random.standard_normal((cols, count)))
    return np.asarray((u * values) @ v.T)


def stack(*matrices: np.ndarray) -> Tensor:
    """Matrices of one shape as a float32 stack."""
    return torch.from_numpy(np.stack(matrices).astype(np.float32))


def distance(result: Tensor, x: Tensor, how: Orthogonalization) -> float:
    """The greatest relative distance (Frobenius) of results from the exact ones."""
    pairs = zip(result.double().numpy(), x.float().numpy(), strict=True)
    distances = []
    for got, given in pairs:
        exact = orthogonalized(given, how.steps, how.eps)
        distances.append(np.linalg.norm(got - exact) / np.linalg.norm(exact))
    return float(max(distances))


def outside(result: np.ndarray, given: np.ndarray, rank: int) -> float:
    """The share of a result (squared Frobenius norm) outside of the spans of a matrix."""
    u, _, vt = np.linalg.svd(given.astype(np.float64), full_matrices=False)
    u, vt = u[:, :rank], vt[:rank]
    inside = u @ (u.T @ result @ vt.T) @ vt
    return float(np.linalg.norm(result - inside) ** 2 / np.linalg.norm(result) ** 2)
