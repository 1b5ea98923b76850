"""Scratch memory for directions of whole matrices: one piece a device, as large as is needed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from optfactory.step.buckets import Bucket
from optfactory.step.matrices import MatrixSteps, MatrixWork, batches_of
from optfactory.step.slots import Slot


class Scratch:
    """Keeps the memory from step to step.

    Args:
        slots: all parameters of the optimizer.
    """

    def __init__(self, slots: Sequence[Slot]) -> None:
        self._slots = slots
        self._memory: dict[torch.device, Tensor] = {}

    def works(self, buckets: Sequence[Bucket]) -> list[Bucket | MatrixWork]:
        """The buckets, those of matrices in batches."""
        found: list[Bucket | MatrixWork] = []
        for bucket in buckets:
            if bucket.key.rule.transform is None:
                found.append(bucket)
            else:
                found += self._steps_of(bucket).follow(bucket)
        return found

    def _steps_of(self, bucket: Bucket) -> MatrixSteps:
        device = bucket.key.device
        if bucket.matrices is None:
            # Parameters that are trained only now may be larger than all before.
            here = [slot for slot in self._slots if slot.local.device == device]
            size = scratch_bytes(here, device)
            if device not in self._memory or len(self._memory[device]) < size:
                self._memory[device] = torch.empty(size, dtype=torch.uint8, device=device)
        memory = self._memory[device]
        if bucket.matrices is None or bucket.matrices.memory is not memory:
            bucket.matrices = MatrixSteps(bucket, memory)
        steps: MatrixSteps = bucket.matrices
        return steps


def scratch_bytes(slots: Iterable[Slot], device: torch.device) -> int:
    """Bytes that directions of whole matrices need on a device, whichever have gradients.

    Args:
        slots: all parameters there.
    """
    own = [slot for slot in slots if slot.layout.rule.transform is not None and slot.is_trained]
    return max((batch.nbytes for batch in batches_of(own, device)), default=0)
