"""One step of all parameters through the backends of their devices."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from optfactory import backends
from optfactory.backends.base import Backend, Findings
from optfactory.backends.exchange import Exchange
from optfactory.rules.passes import Stage
from optfactory.sharding.dtensors import local_values
from optfactory.step import gradients, skipping
from optfactory.step.buckets import Bucket
from optfactory.step.interrupts import Uninterrupted
from optfactory.step.matrices import MatrixWork
from optfactory.step.plan import StepPlan
from optfactory.step.scratch import Scratch


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
    exchange = exchange_of(plan)
    if not any(backends.backend_for(device).capturing(device) for device in plan.devices):
        exchange.agree_on_matrices(buckets)  # a graph repeats what was agreed on before it
    skips = _hand_over(optimizer, buckets, exchange)
    try:
        _run(buckets, plan.scratch, exchange, skips)
    finally:
        # Buckets outlive the step; a gradient they kept would stay in memory behind zero_grad.
        for bucket in buckets:
            bucket.gradients = []
            bucket.grad_scale = bucket.found_inf = None
        plan.scratch.release(buckets)
    return bool(buckets)


def is_only_for_state(plan: StepPlan, groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a first step asks for state and nothing else: all gradients and learning rates are 0.

    torch.distributed.checkpoint makes an optimizer's state by such a step. It must not count, or
    the first real one would be corrected for a bias that is not there.
    """
    if not all(float(group["lr"]) == 0 for group in groups):
        return False
    present = [p.grad for p in plan.parameters if p.grad is not None]
    exchange = exchange_of(plan)
    if not (present or exchange.is_sharded):
        return False
    moved = any(bool((local_values(gradient) != 0).any()) for gradient in present)
    if exchange.is_sharded:
        moved = bool(exchange.agree([torch.tensor(moved, dtype=torch.float32, device="cpu")]))
    return not moved


def exchange_of(plan: StepPlan) -> Exchange:
    """What the processes of sharded parameters tell each other; kept with the plan."""
    if plan.exchange is None:
        plan.exchange = Exchange(plan.slots)
    return plan.exchange  # type: ignore[no-any-return]


def _hand_over(optimizer: Optimizer, buckets: list[Bucket], exchange: Exchange) -> bool:
    """Give buckets what a GradScaler found and what was found here, as all processes have it.

    Returns:
        Whether the host knows already that this step is skipped.
    """
    own = skipping.found_nonfinite(buckets)
    agreed = None
    if exchange.is_sharded and skipping.may_skip(optimizer):
        handed = gradients.handed_over(optimizer, "found_inf", exchange.device)
        agreed = own = exchange.agree([flag for flag in (own, handed) if flag is not None])
    for bucket in buckets:
        device = bucket.key.device
        bucket.grad_scale = gradients.handed_over(optimizer, "grad_scale", device)
        handed = gradients.handed_over(optimizer, "found_inf", device)
        flag = None if own is None else own.to(device, non_blocking=True)
        bucket.found_inf = handed if flag is None else flag if handed is None else flag + handed
    return agreed is not None and exchange.waits_on_host and float(agreed) != 0


def _run(buckets: list[Bucket], scratch: Scratch, exchange: Exchange, skips: bool) -> None:
    """Prepare all buckets, then update them: what can fail, fails before anything is written."""
    works = scratch.works(buckets)
    first = [part.direction if isinstance(part, MatrixWork) else part for part in works]
    last = [part.step for part in works if isinstance(part, MatrixWork)]
    work = [(backends.backend_for(bucket.key.device), bucket) for bucket in (*first, *last)]
    for backend in {id(backend): backend for backend, _ in work}.values():
        backend.prepare([bucket for chosen, bucket in work if chosen is backend])
    before = work[: len(first)]
    if exchange.has_stages and not skips:
        passes = _up_to_update(before, exchange)
    else:
        passes = [backend.update(bucket) for backend, bucket in before]
    with Uninterrupted():
        for part, rest in zip(works, passes, strict=True):
            _finish(part, rest)
        for bucket in buckets:
            _increment_versions([*bucket.parameters, *bucket.wrappers])


def _finish(part: Bucket | MatrixWork, rest: Iterator[Findings]) -> None:
    """The rest of an update; of matrices, the products and the step behind it too."""
    if not isinstance(part, MatrixWork):
        deque(rest, maxlen=0)
        return
    part.begin()
    deque(rest, maxlen=0)
    part.transform()
    deque(backends.backend_for(part.step.key.device).update(part.step), maxlen=0)


Passes = list[Iterator[Findings]]


def _up_to_update(work: list[tuple[Backend, Bucket]], exchange: Exchange) -> Passes:
    """Run the passes that only find something, and complete what they find over the processes.

    Signals may interrupt here: nothing was written yet, and another process may never answer.
    """
    passes = [backend.update(bucket) for backend, bucket in work]
    buckets = [bucket for _, bucket in work]
    for stage in Stage:
        pairs = zip(buckets, passes, strict=True)
        paused = [(bucket, rest) for bucket, rest in pairs if stage in bucket.key.sums]
        here = [(bucket, next(rest, None)) for bucket, rest in paused]
        exchange.complete(stage, [(bucket, found) for bucket, found in here if found is not None])
    return passes


def _increment_versions(tensors: list[Tensor]) -> None:
    """Tell autograd that tensors changed: a later backward through old values must fail."""
    try:
        torch.autograd.graph.increment_version(tensors)
    except TypeError:  # older torch takes one tensor at a time
        for tensor in tensors:
            torch.autograd.graph.increment_version(tensor)


def _kernels_divide(device: torch.device) -> bool:
    return backends.backend_for(device).divides_gradients
