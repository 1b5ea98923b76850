"""What happens to gradients before a step: a GradScaler's factor, and a look for infinities."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


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


def found_nonfinite(groups: Sequence[Mapping[str, Any]]) -> Tensor | None:
    """Not 0 if a gradient is not finite and its group says to skip the step then."""
    norms: list[Tensor] = []
    for group in groups:
        if group["nonfinite"] == "skip_step":
            present = [p.grad for p in group["params"] if p.grad is not None and p.numel()]
            norms += torch._foreach_norm(present, torch.inf) if present else []
    if not norms:
        return None
    home = norms[0].device
    together = torch.stack([norm.float().to(home, non_blocking=True) for norm in norms])
    return (~together.isfinite()).any().float()
