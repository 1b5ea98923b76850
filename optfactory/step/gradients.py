"""What happens to gradients before a step: a GradScaler's factor, and a look for infinities."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

from optfactory.errors import ConfigError
from optfactory.step.callers import caller_in


def computed(gradient: Tensor | None) -> Tensor | None:
    """A lazy gradient as an ordinary tensor: one that is negated, or 0, when it is read."""
    if gradient is None or not gradient._is_zerotensor():
        return None if gradient is None else gradient.resolve_neg()
    return torch.zeros(gradient.shape, dtype=gradient.dtype, device=gradient.device)


def refuse_scaled_closure(optimizer: Optimizer) -> None:
    """Refuse a closure that a GradScaler passes on: its gradients would be applied unscaled.

    torch's scaler refuses one by keyword, and lets a positional one through.

    Raises:
        ConfigError: says what to do instead.
    """
    handed = [getattr(optimizer, name, None) for name in ("grad_scale", "found_inf")]
    if handed == [None, None] and not _called_by_scaler():
        return
    raise ConfigError(
        "a closure cannot be combined with a GradScaler: it would compute gradients behind the "
        "unscaling. Call scaler.scale(loss).backward() and then scaler.step(optimizer) without a "
        "closure, or train in bfloat16, which needs no scaler"
    )


def _called_by_scaler() -> bool:
    frame = caller_in("torch.amp.grad_scaler")
    return frame is not None and bool(getattr(frame.f_locals.get("self"), "_enabled", True))


def handed_over(optimizer: Optimizer, name: str, device: torch.device) -> Tensor | None:
    """What torch.amp.GradScaler set on the optimizer for this step, on a device.

    Args:
        name: ``grad_scale`` or ``found_inf``.
    """
    value = getattr(optimizer, name, None)
    if value is None:
        return None
    return torch.as_tensor(value, dtype=torch.float32).to(device, non_blocking=True)


def division(
    optimizer: Optimizer, kernels_divide: Callable[[torch.device], bool]
) -> Callable[[Tensor], Tensor] | None:
    """How to divide gradients by a GradScaler's factor where kernels do not do it."""
    if getattr(optimizer, "grad_scale", None) is None:
        return None

    def divided(gradient: Tensor) -> Tensor:
        scale = handed_over(optimizer, "grad_scale", gradient.device)
        if scale is None or kernels_divide(gradient.device):
            return gradient
        # In float32: 16 bits would lose what the factor saved from underflow.
        return gradient.float() * (1.0 / scale)

    return divided
