"""Whether a parameter can be updated with its gradient, and why not."""

from __future__ import annotations

import torch
from torch import Tensor

from optfactory.errors import ConfigError
from optfactory.groups.parameters import parameter_problem
from optfactory.memory.presence import memory_problem
from optfactory.state.layout import StateLayout
from optfactory.state.specs import LOSS_KEY, LOW_KEY
from optfactory.step.slots import Slot


def refuse_unusable(slot: Slot, gradient: Tensor) -> None:
    """Raise if a parameter cannot be updated with this gradient.

    Raises:
        ConfigError: says which parameter, why, and what to do.
    """
    problem = _problem(slot, gradient)
    if problem:
        raise ConfigError(f"cannot update {slot.name}: {problem}")


def _problem(slot: Slot, gradient: Tensor) -> str:
    """Why a parameter cannot be updated with this gradient; empty if it can."""
    p, layout = slot.local, slot.layout
    if gradient.layout is not torch.strided:
        return f"its gradient is sparse ({gradient.layout}); create the embedding with sparse=False"
    if gradient.dtype not in (p.dtype, torch.float32):
        return (
            f"its gradient has dtype {gradient.dtype}; "
            f"allowed are {p.dtype} (the parameter's) and torch.float32"
        )
    kinds = _dtypes_beside(layout)
    if kinds and p.dtype not in kinds:
        return (
            f"it is {p.dtype} now, and its state '{layout.kept_key}' is for "
            f"{' and '.join(map(str, kinds))}; keep its dtype"
        )
    homes = layout.homes(slot.state, p.device)
    if {p.device, gradient.device, *homes} != {p.device}:
        state = ", ".join(map(str, homes))
        return (
            f"the parameter is on {p.device}, its gradient on {gradient.device}, its state on "
            f"{state}; move the model before its optimizer is built"
        )
    if not p.shape == gradient.shape == layout.local_shape:
        return (
            f"its shape is {tuple(p.shape)}, its gradient's {tuple(gradient.shape)}, its state was "
            f"made for {layout.local_shape}; after a resize along the first dimension call "
            "optimizer.replace_parameter(old, new), which carries its state over (old and new are "
            "the same where its data was replaced), else build a new optimizer"
        )
    problem = memory_problem(gradient)
    return (
        parameter_problem(slot.parameter)
        or memory_problem(p)
        or (problem and f"its gradient {problem}")
    )


def _dtypes_beside(layout: StateLayout) -> tuple[torch.dtype, ...]:
    """Which dtypes a parameter has what is kept beside it for; none if nothing is."""
    if layout.kept_key == LOSS_KEY:
        return (layout.tensors[LOSS_KEY].dtype,)
    if layout.kept_key == LOW_KEY:
        return (torch.bfloat16,)
    return (torch.bfloat16, torch.float16) if layout.kept_key else ()
