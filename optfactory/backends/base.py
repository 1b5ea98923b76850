"""What every backend offers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from optfactory.errors import StateError
from optfactory.rules.passes import Stage
from optfactory.step.buckets import Bucket

# Step counters are float64, which count exactly up to here.
LAST_STEP = 2.0**53

WARM_UP = (
    "a CUDA graph is being captured, but the optimizer's state and tables for these parameters do "
    "not exist yet; take a few steps before the capture, with the same parameters having gradients"
)


@dataclass(frozen=True)
class Findings:
    """What a pass found in the parts of tensors that are here.

    Whoever knows of other parts completes it in place, before the next pass reads it and puts what
    it finds itself into the same memory.

    Attributes:
        sums: float64 [slots, n], contiguous, on the bucket's device (float32 where there is no
            float64): sums of g^2, of p^2 and g^2, or of p^2, u^2 and elements that agree with
            their gradients; None if the stage needs none.
        maxima: numbers of slots that are sharded, each with float32 numbers from 0 on, of which
            the greatest of all parts is needed: the new scales, state by state.
    """

    stage: Stage
    sums: Tensor | None
    maxima: list[tuple[int, Tensor]]


def steps_problem(bucket: Bucket, steps: Sequence[float]) -> StateError:
    """The error for step counters that are no counts: others write to this memory."""
    names = [s.name for s, n in zip(bucket.slots, steps, strict=True) if not 0 <= n < LAST_STEP]
    return StateError(
        f"the state 'step' of {', '.join(names[:5])} is no count of steps; does another process or "
        "thread write to it? Share parameters between processes, and give each its own optimizer"
    )


class Backend(Protocol):
    """Updates the parameters and states of a bucket in place."""

    name: str
    # Whether `update` can be recorded into a CUDA graph, with steps and scalars on the device.
    supports_capture: bool
    # Whether kernels divide gradients by a GradScaler's factor; otherwise they get them divided.
    divides_gradients: bool

    def capturing(self, device: torch.device) -> bool:
        """Whether what is launched on this device now is recorded into a graph, and not run."""

    def prepare(self, buckets: Sequence[Bucket]) -> None:
        """Get ready for these buckets, e.g. compile kernels.

        Everything that can fail, fails here: before anything was written.

        Raises:
            KernelCompileError: a kernel cannot be built.
        """

    def update(self, bucket: Bucket) -> Iterator[Findings]:
        """Advance the bucket's steps by one and update its parameters and states.

        Pauses after each pass that looks at whole tensors, if the bucket has such: sharded ones
        are looked at in part. Steps advance, and parameters and states change, behind the last
        pause, except that the history of clipping is noted behind the first. Nothing is found in
        a bucket that the host knows is skipped. Buckets may be run beside each other, unless
        their turns differ.
        """
