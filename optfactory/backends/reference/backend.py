"""The portable backend: the rule texts as plain torch operations, on any device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from optfactory.backends.base import LAST_STEP, Findings, steps_problem
from optfactory.backends.reference.program import torch_update
from optfactory.backends.reference.work import Work
from optfactory.backends.walk import Walk
from optfactory.rules.passes import Stage
from optfactory.step.buckets import Bucket


class ReferenceBackend:
    """Updates one parameter after the other; temporaries are a few times the parameter's size."""

    name = "reference"
    supports_capture = False
    divides_gradients = False

    def capturing(self, device: torch.device) -> bool:
        return False

    def prepare(self, buckets: Sequence[Bucket]) -> None:
        for bucket in buckets:
            torch_update(bucket.key.rule)
            for slot in bucket.slots:
                slot.layout.check(slot.name, slot.state, slot.local.device)
                Walk.of(slot)  # random bits need it
            steps = [slot.state["step"].item() for slot in bucket.slots]
            if not all(0 <= step < LAST_STEP for step in steps):
                raise steps_problem(bucket, steps)

    def update(self, bucket: Bucket) -> Iterator[Findings]:
        if bucket.must_skip():
            return
        work, stages = _work(bucket), bucket.key.sums
        if Stage.GRADIENTS in stages:
            sums = torch.stack([item.sum_of_gradient() for item in work]).view(-1, 1)
            yield Findings(Stage.GRADIENTS, sums, [])
            for item, row in zip(work, sums, strict=True):
                item.clip(row[0])
        if Stage.NORMS in stages:
            sums = torch.stack([item.norms() for item in work])
            yield Findings(Stage.NORMS, sums, [])
            for item, row in zip(work, sums, strict=True):
                item.find_ratio(row)
        if Stage.TENSORS in stages:
            found = [item.statistics() for item in work]
            sums = torch.stack([row for row, _ in found])
            maxima = [(index, scales) for index, (_, scales) in enumerate(found)]
            yield Findings(
                Stage.TENSORS,
                sums if stages[Stage.TENSORS] else None,
                [(n, m) for n, m in maxima if bucket.slots[n].layout.piece is not None and len(m)],
            )
            for item, row, (_, scales) in zip(work, sums, maxima, strict=True):
                item.complete(row, scales)
        for slot in bucket.slots:
            slot.state["step"].add_(1)
        for item in work:
            item.update()


def _work(bucket: Bucket) -> list[Work]:
    steps = [slot.state["step"].item() + 1 for slot in bucket.slots]
    rows, indices = bucket.scalar_rows(steps)
    names = bucket.key.rule.all_scalars
    tables = [dict(zip(names, row, strict=True)) for row in rows]
    return [
        Work(slot, gradient, tables[index])
        for slot, gradient, index in zip(bucket.slots, bucket.gradients, indices, strict=True)
    ]
