"""Steps that are not taken: what a GradScaler or a group says of gradients that are not finite."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from optfactory.step.buckets import Bucket


def may_skip(optimizer: Optimizer) -> bool:
    """Whether a step may be skipped: by a GradScaler, or because a group says so."""
    if getattr(optimizer, "found_inf", None) is not None:
        return True
    return any(group["nonfinite"] == "skip_step" for group in optimizer.param_groups)


def found_nonfinite(buckets: Sequence[Bucket]) -> Tensor | None:
    """Not 0 if a gradient is not finite and its group says to skip the step then."""
    norms: list[Tensor] = []
    for bucket in buckets:
        if not any(group["nonfinite"] == "skip_step" for group in bucket.groups):
            continue
        present = [
            gradient
            for slot, gradient in zip(bucket.slots, bucket.gradients, strict=True)
            if slot.group["nonfinite"] == "skip_step" and gradient.numel()
        ]
        norms += torch._foreach_norm(present, torch.inf) if present else []
    if not norms:
        return None
    home = norms[0].device
    together = torch.stack([norm.float().to(home, non_blocking=True) for norm in norms])
    return (~together.isfinite()).any().float()
