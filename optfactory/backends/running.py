"""One step of all parameters through the backends of their devices."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from optfactory import backends
from optfactory.step import gradients
from optfactory.step.interrupts import Uninterrupted
from optfactory.step.plan import Bucket, StepPlan


def run_step(optimizer: Optimizer, plan: StepPlan) -> bool:
    """Update every parameter that has a gradient, whose state is there.

    Args:
        optimizer: holds what a GradScaler handed over for this step.

    Returns:
        Whether there was any.

    Raises:
        ConfigError, StateError, KernelCompileError: as `Optimizer2State.step`.
    """
    buckets = plan.gather(gradients.division(optimizer, _kernels_divide))
    found = gradients.found_nonfinite(optimizer.param_groups)
    for bucket in buckets:
        bucket.grad_scale = gradients.handed_over(optimizer, "grad_scale", bucket.key.device)
        handed = gradients.handed_over(optimizer, "found_inf", bucket.key.device)
        own = None if found is None else found.to(bucket.key.device, non_blocking=True)
        bucket.found_inf = handed if own is None else own if handed is None else own + handed
    try:
        _run(buckets)
    finally:
        # Buckets outlive the step; a gradient they kept would stay in memory behind zero_grad.
        for bucket in buckets:
            bucket.gradients = []
            bucket.grad_scale = bucket.found_inf = None
    return bool(buckets)


def _run(buckets: list[Bucket]) -> None:
    """Prepare all buckets, then update them: what can fail, fails before anything is written."""
    work = [(backends.backend_for(bucket.key.device), bucket) for bucket in buckets]
    for backend in {id(backend): backend for backend, _ in work}.values():
        backend.prepare([bucket for chosen, bucket in work if chosen is backend])
    with Uninterrupted():
        for backend, bucket in work:
            for _ in backend.update(bucket):
                pass
            _increment_versions([*bucket.parameters, *bucket.wrappers])


def _increment_versions(tensors: list[Tensor]) -> None:
    """Tell autograd that tensors changed: a later backward through old values must fail."""
    try:
        torch.autograd.graph.increment_version(tensors)
    except TypeError:  # older torch takes one tensor at a time
        for tensor in tensors:
            torch.autograd.graph.increment_version(tensor)


def _kernels_divide(device: torch.device) -> bool:
    return backends.backend_for(device).divides_gradients
