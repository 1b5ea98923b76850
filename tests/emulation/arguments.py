"""Kernel arguments as the backend makes them: arrays of one element."""

from __future__ import annotations

import numpy as np
import torch


def address(tensor: torch.Tensor) -> np.ndarray:
    """A pointer parameter."""
    return np.array(tensor.data_ptr(), np.uint64)


def integer(value: int) -> np.ndarray:
    """An int parameter."""
    return np.array(value, np.int32)
