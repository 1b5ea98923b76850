"""Tools of the conformance tests: twins to train beside a peer, and how far they came apart."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests.devices import host
from tests.numerics.harness import array, gradient, parameters
from tests.reference.quantization import Codec, nearest_code
from tests.reference.tracked import spacing

Array = NDArray[Any]
Deviation = Callable[[str, float, float], None]

STATES = ("exp_avg", "exp_avg_sq")


def pair(
    shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], list[Tensor]]:
    """Trainable tensors and copies of them for the peer."""
    ours = parameters(dtype, shapes)
    return ours, [p.detach().clone().requires_grad_() for p in ours]


def feed(step: int, *sides: list[Tensor]) -> None:
    """Give all sides one step's gradients, each in its parameter's dtype."""
    for number, p in enumerate(sides[0]):
        g = gradient(tuple(p.shape), p.dtype, 1000 * step + number)
        for side in sides:
            side[number].grad = g.to(side[number].dtype, copy=True)


def apart(ours: Tensor, theirs: Tensor, path: float) -> float:
    """Largest difference as a share of the parameter and of the way it can have gone."""
    want = host(theirs).double()
    return float(((host(ours).double() - want).abs() / (want.abs() + path)).max())


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Largest absolute difference."""
    return float((host(ours).double() - host(theirs).double()).abs().max())


def assert_parameter(p: Tensor, their: Tensor, deviation: Deviation, units: int = 1) -> None:
    """Equal within a unit in the last place, in float32 that of 0.2 at least: 1.5e-8."""
    got, want = array(p), array(their)
    least = spacing(np.array(0.2 if p.dtype == torch.float32 else 0.0), p.dtype)
    off = np.abs(got - want) / np.maximum(spacing(want, p.dtype), least)
    deviation("p, units in the last place", off.max(), units)
    if p.dtype != torch.float32:
        deviation("p, share that is rounded otherwise", float((off > 0).mean()), 1e-3)


def off_boundaries(y: Array, codec: Codec, error: Array | float = 0.0) -> NDArray[np.bool_]:
    """Where y, which may be off by `error` and by a few units in its last place, has one code."""
    y = np.asarray(y, dtype=np.float64)
    margin = 1e-6 * np.abs(y) + error
    return nearest_code(y - margin, codec) == nearest_code(y + margin, codec)


def peer(name: str) -> Any:
    """Another library's module, whose own warnings are not ours; the test is skipped without it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, exc_type=ImportError)


@contextmanager
def eager() -> Iterator[None]:
    """Run what a peer hands to torch.compile as it is: compiling takes minutes, not numbers."""
    with torch.compiler.set_stance("force_eager"):
        yield
