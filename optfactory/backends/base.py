"""What every backend offers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from optfactory.step.plan import Bucket

WARM_UP = (
    "a CUDA graph is being captured, but the optimizer's state and tables for these parameters do "
    "not exist yet; take a few steps before the capture, with the same parameters having gradients"
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

    def update(self, bucket: Bucket) -> None:
        """Advance the bucket's steps by one and update its parameters and states."""
