"""Scratch memory for directions of whole matrices: one piece a device, as large as is needed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optfactory.sharding.team import Team
from optfactory.step.batches import batches_of
from optfactory.step.buckets import Bucket
from optfactory.step.matrices import MatrixSteps, MatrixWork
from optfactory.step.slots import Slot


class Scratch:
    """Keeps the memory from step to step.

    Args:
        slots: all parameters of the optimizer.
    """

    def __init__(self, slots: Sequence[Slot]) -> None:
        self._slots = slots
        self._shares: dict[torch.device, _Share] = {}

    @property
    def nbytes(self) -> int:
        """Bytes that are held, of all devices."""
        return sum(share.memory.nbytes for share in self._shares.values())

    def works(self, buckets: Sequence[Bucket]) -> list[Bucket | MatrixWork]:
        """The buckets, those of matrices in batches.

        Batches that processes work at together come last, in the same order on all of them.
        """
        found: list[Bucket | MatrixWork] = []
        for bucket in buckets:
            if bucket.key.rule.transform is None:
                found.append(bucket)
            else:
                found += self._steps_of(bucket).follow(bucket)
        return sorted(found, key=_order)

    @staticmethod
    def release(buckets: Sequence[Bucket]) -> None:
        """Let go of this step's gradients."""
        for bucket in buckets:
            if bucket.matrices is not None:
                bucket.matrices.release()

    def sent_bytes(self, buckets: Sequence[Bucket]) -> int:
        """Bytes of parts of matrices that this process sends to others for these buckets."""
        works = [work for work in self.works(buckets) if isinstance(work, MatrixWork)]
        return sum(work.assembly.sent_bytes for work in works if work.assembly is not None)

    def _steps_of(self, bucket: Bucket) -> MatrixSteps:
        share = self._share_of(bucket)
        steps: MatrixSteps | None = bucket.matrices
        if steps is None or steps.memory is not share.memory:
            packed = batches_of(bucket.slots, bucket.key.device, share.limits)
            steps = bucket.matrices = MatrixSteps(bucket, packed, share.memory)
        return steps

    def _share_of(self, bucket: Bucket) -> _Share:
        """The memory of a device, anew if it was made without one of the bucket's parameters."""
        device, numbers = bucket.key.device, {slot.number for slot in bucket.slots}
        share = self._shares.get(device)
        if share is None or not numbers <= share.numbers:
            here = [slot for slot in self._slots if slot.local.device == device]
            self._shares.pop(device, None)
            share = self._shares[device] = _Share.of(_of_matrices(here), device)
        return share


@dataclass(frozen=True)
class _Share:
    """The memory of one device.

    Attributes:
        numbers: the parameters for which it is enough, any of them together.
        limits: the bytes of it for the matrices of each team.
    """

    memory: Tensor
    numbers: frozenset[int]
    limits: dict[Team | None, int]

    @classmethod
    def of(cls, slots: Sequence[Slot], device: torch.device) -> _Share:
        limits = _limits(slots, device)
        size = max(limits.values(), default=0)
        memory = torch.empty(size, dtype=torch.uint8, device=device)
        return cls(memory, frozenset(slot.number for slot in slots), limits)


def scratch_bytes(slots: Iterable[Slot], device: torch.device) -> int:
    """Bytes that directions of whole matrices need on a device, whichever have gradients.

    Args:
        slots: all parameters there.
    """
    return max(_limits(_of_matrices(slots), device).values(), default=0)


def _of_matrices(slots: Iterable[Slot]) -> list[Slot]:
    return [slot for slot in slots if slot.layout.rule.transform is not None and slot.is_trained]


def _limits(slots: Sequence[Slot], device: torch.device) -> dict[Team | None, int]:
    """Bytes for the matrices of each team: those of its largest batch."""
    packed = batches_of(slots, device)
    return {team: max(batch.nbytes for batch in batches) for team, batches in packed.items()}


def _order(part: Bucket | MatrixWork) -> tuple[int, int]:
    return part.order if isinstance(part, MatrixWork) else (part.key.turn, -1)
