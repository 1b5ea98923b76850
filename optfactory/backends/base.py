"""What every backend offers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from optfactory.plan import Bucket


class Backend(Protocol):
    """Updates the parameters and states of a bucket in place."""

    name: str
    # Whether `update` can be recorded into a CUDA graph, with steps and scalars on the device.
    supports_capture: bool

    def prepare(self, buckets: Sequence[Bucket]) -> None:
        """Get ready for these buckets, e.g. compile kernels.

        Everything that can fail, fails here: before anything was written.

        Raises:
            KernelCompileError: a kernel cannot be built.
        """

    def update(self, bucket: Bucket) -> None:
        """Advance the bucket's steps by one and update its parameters and states."""
