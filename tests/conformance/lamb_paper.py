"""LAMB in float64, from its paper (You et al. 2020, arXiv:1904.00962, Algorithm 2), for one layer.

    m_t = beta1 m_{t-1} + (1 - beta1) g_t         m_hat = m_t / (1 - beta1^t)
    v_t = beta2 v_{t-1} + (1 - beta2) g_t^2       v_hat = v_t / (1 - beta2^t)
    r_t = m_hat / (sqrt(v_hat) + eps)
    x_{t+1} = x_t - eta phi(|x_t|) / |r_t + lambda x_t| (r_t + lambda x_t)

with phi the identity, as in the paper's experiments. Algorithm 2 corrects the bias, the appendix
allows to leave that out. A layer or an update of norm zero takes the ratio 1, as in the published
implementations: to the letter a layer of zeros would stay zero for ever.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.reference.quantization import BLOCK
from tests.reference.tables import SIGNED, UNSIGNED

Array = NDArray[Any]


class Layer:
    """One layer's weights `x`, its moments, and what the last step was made of."""

    def __init__(
        self,
        x: Array,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        bias_correction: bool = True,
    ) -> None:
        self.x = np.array(x, dtype=np.float64)
        self.m, self.v = np.zeros_like(self.x), np.zeros_like(self.x)
        self.t, self.ratio = 0, 1.0
        self.u = np.zeros_like(self.x)
        self.lr, self.betas, self.eps = lr, betas, eps
        self.weight_decay, self.bias_correction = weight_decay, bias_correction

    def step(self, g: Array) -> None:
        beta1, beta2 = self.betas
        self.t += 1
        self.m = beta1 * self.m + (1 - beta1) * g
        self.v = beta2 * self.v + (1 - beta2) * g**2
        self.u = self.direction(self.m, self.v) + self.weight_decay * self.x
        top, bottom = float(np.linalg.norm(self.x)), float(np.linalg.norm(self.u))
        self.ratio = top / bottom if top > 0 and bottom > 0 else 1.0
        self.x = self.x - self.lr * self.ratio * self.u

    def direction(self, m: Array, v: Array) -> Array:
        """r, from moments that need not be this layer's."""
        c1, c2 = (1 - beta**self.t if self.bias_correction else 1.0 for beta in self.betas)
        result: Array = (m / c1) / (np.sqrt(v / c2) + self.eps)
        return result


class Quantization:
    """How far 8-bit state can lead away from a layer's exact trajectory, element by element.

    Each store moves a moment by half of its cell of the map at most, times the block's scale. What
    that does to the moments, the direction, both norms and the weights is followed as intervals,
    from the exact trajectory and the map alone; blocks are those of a row of the layer.
    """

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.m, self.v, self.x = (np.zeros_like(layer.x) for _ in range(3))

    def step(self, before: Array) -> None:
        """After the layer's step from the weights `before`: `x` bounds the error of the weights."""
        layer, (beta1, beta2) = self.layer, self.layer.betas
        self.m, self.v = beta1 * self.m, beta2 * self.v
        u = self._direction() + layer.weight_decay * self.x
        norms = [(float(np.linalg.norm(a)), float(np.linalg.norm(b)))
                 for a, b in ((before, self.x), (layer.u, u))]  # fmt: skip
        (top, top_error), (bottom, bottom_error) = norms
        if bottom_error >= bottom:
            raise ArithmeticError("the update's error is as large as the update")
        high = (top + top_error) / (bottom - bottom_error)
        low = (top - top_error) / (bottom + bottom_error)
        ratio_error = max(high - layer.ratio, layer.ratio - low)
        self.x = self.x + layer.lr * (ratio_error * np.abs(layer.u) + high * u)
        self.m = self.m + _store_error(layer.m, self.m, SIGNED)
        self.v = self.v + _store_error(layer.v, self.v, UNSIGNED)

    def _direction(self) -> Array:
        layer = self.layer
        exact = layer.direction(layer.m, layer.v)
        ends = [
            layer.direction(layer.m + sign * self.m, np.maximum(v, 0))
            for sign in (-1, 1)
            for v in (layer.v - self.v, layer.v + self.v)
        ]
        result: Array = np.max([np.abs(end - exact) for end in ends], axis=0)
        return result


def _store_error(x: Array, error: Array, values: Array) -> Array:
    """Bound of |stored - x'| for every x' within `error` of x.

    A scale is the block's largest number, or for negative ones 1 / 0.993 of it. 0 is exact.
    """
    rows, length = x.shape
    shape = (rows, -(-length // BLOCK), BLOCK)
    padded = [np.zeros((rows, shape[1] * BLOCK)) for _ in range(2)]
    for whole, part in zip(padded, (np.abs(x), error), strict=True):
        whole[:, :length] = part
    size, margin = (whole.reshape(shape) for whole in padded)
    largest = (size + margin).max(axis=2, keepdims=True) / float(values[254])
    least = np.maximum((size - margin).max(axis=2, keepdims=True), np.finfo(np.float64).tiny)
    relative = np.minimum((size + margin) / least, 1)
    bound = largest * _half_cells(values)[np.searchsorted(values[values > 0], relative)]
    bound[size + margin == 0] = 0.0
    result: Array = bound.reshape(rows, -1)[:, :length]
    return result


def _half_cells(values: Array) -> Array:
    """By how many positive map values lie below |y|: how far off the code of y can be, at most.

    The smallest one counts whole, for a second moment above 0 is not stored as 0.
    """
    positive = np.concatenate([[0.0], values[values > 0].astype(np.float64)])
    half = np.diff(positive) / 2
    half[0] = positive[1]
    widest = np.maximum.accumulate(half)
    result: Array = np.append(widest, widest[-1])
    return result
