"""torchao's low-bit optimizers in the checkpoint tests, and how exact our states are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from optfactory import Optimizer2State, build_optimizer
from tests.checkpoints.harness import Array, array
from tests.conformance.harness import peer
from tests.torch_api.harness import clones, held, through_file, train

# Rows of whole blocks; one row; rows that blocks of the flattened tensor cross; what their blocks
# of 256 do not divide, what those of 128 do not either; too few elements.
SHAPES = [(18, 512), (4096,), (32, 320), (64, 70), (20, 301), (255,), ()]
WHOLE_ROWS = (0, 1)

STATES = ("exp_avg", "exp_avg_sq")
WIDTHS = {"8bit": "adamw8bit", "4bit": "adamw4bit", "Fp8": "adamw_fp8"}
CLASSES = {"8bit": "OptimState8bit", "4bit": "OptimState4bit", "Fp8": "OptimStateFp8"}

# How far a stored value may be from a number, by the greatest in its block.
PRECISION = {
    "32bit": 0.0,
    "16bit": 2.0**-8,
    "8bit": 0.008,
    "fp8": 0.036,
    "4bit": 1 / 6,
}

widths = pytest.mark.parametrize("width", WIDTHS)


def weights(shapes: list[tuple[int, ...]] = SHAPES, dtype: Any = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def theirs(width: str, params: list[Tensor], kind: str = "AdamW", **options: Any) -> Any:
    return getattr(peer("torchao.optim"), f"{kind}{width}")(params, **options)


def trained(width: str, steps: int = 3, dtype: Any = torch.float32, **options: Any) -> Any:
    optimizer = theirs(width, weights(dtype=dtype), **options)
    train(optimizer, range(steps))
    return optimizer


def values(state: Tensor) -> Array:
    """The values of one of their states, by their own reckoning."""
    return array(state.dequantize() if is_low_bit(state) else state)


def is_low_bit(state: object) -> bool:
    return type(state).__name__ in CLASSES.values()


def ours_of(optimizer: Optimizer2State, p: Tensor, key: str) -> Array:
    """The values of one of our states, by the export to torch."""
    index = next(i for i, q in enumerate(held(optimizer)) if q is p)
    return array(optimizer.export_state_dict("torch")["state"][index][key])


def format_of(optimizer: Optimizer2State, p: Tensor, key: str) -> str:
    state = optimizer.state[p]
    for suffix, found in {"_q8": "8bit", "_fp8": "fp8", "_q4": "4bit"}.items():
        if f"{key}{suffix}" in state:
            return found
    return "16bit" if state[key].dtype == torch.bfloat16 else "32bit"


def assert_near(got: Array, want: Array, share: float) -> None:
    """Within this share of the greatest magnitude, which is as great as any block's."""
    assert np.isfinite(want).all()
    assert np.abs(got - want).max(initial=0.0) <= share * np.abs(want).max(initial=0.0)


def loaded(name: str, other: Any, **options: Any) -> Optimizer2State:
    optimizer = build_optimizer(name, clones(held(other)), **options)
    optimizer.load_state_dict(through_file(other.state_dict()))
    return optimizer
