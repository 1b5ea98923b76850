"""What passes over parts of tensors find, completed over the processes that hold the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from optfactory.backends.base import Findings
from optfactory.errors import ConfigError
from optfactory.rules.passes import Stage, sums_of
from optfactory.sharding.reduction import Reduction, agree, host_can_answer, sweep_of
from optfactory.step.buckets import Bucket
from optfactory.step.owners import team_of
from optfactory.step.slots import Slot

_WORDS: dict[str, Any] = {"dtype": torch.int64, "device": "cpu"}

Found = Sequence[tuple[Bucket, Findings]]


class Exchange:
    """The collectives of a step, the same on all processes whatever gradients each of them has.

    A tensor whose parts need nothing of each other takes no part: element-wise rules have none.

    Attributes:
        device: where vectors are; the one of the first sharded parameter.

    Args:
        slots: all parameters of the optimizer.
    """

    def __init__(self, slots: Sequence[Slot]) -> None:
        sharded = [slot for slot in slots if slot.layout.piece is not None]
        self._sums = {stage: _sums(sharded, stage) for stage in Stage}
        self._maxima = _maxima(sharded)
        self.device = sharded[0].local.device if sharded else torch.device("cpu")
        meshes = [s.layout.piece.sharding.mesh for s in sharded if s.layout.piece is not None]
        self._everyone = sweep_of(meshes)
        self._names = {
            slot.number: slot.name
            for slot in sharded
            if slot.layout.rule.transform is not None and team_of(slot) is not None
        }

    @property
    def is_sharded(self) -> bool:
        """Whether other processes hold parts of the parameters, or the same ones."""
        return bool(self._everyone)

    @property
    def waits_on_host(self) -> bool:
        """Whether findings are on the CPU, so that a flag is looked at before they are."""
        return self.device.type == "cpu"

    @property
    def has_stages(self) -> bool:
        """Whether there is something to complete."""
        return bool(self._maxima.size or any(sums.size for sums in self._sums.values()))

    def agree(self, flags: Sequence[Tensor]) -> Tensor:
        """A flag that is not 0 on all processes if one of these is not 0 on one."""
        own = torch.zeros(1, dtype=torch.float32, device=self.device)
        for flag in flags:
            own += flag.reshape(1).to(self.device, non_blocking=True).ne(0)
        agree(own, self._everyone)
        return own.reshape(())

    def agree_on_matrices(self, buckets: Sequence[Bucket]) -> None:
        """Make sure that all processes put the same matrices together in this step.

        They wait for each other's parts. So each says in which bucket it has a matrix, by the first
        of those that are spread there; 0 is for one without a gradient.

        Raises:
            ConfigError: on all processes, if one has a gradient where another has none.
        """
        if not self._names:
            return
        places = list(self._names)
        device = torch.device("cpu") if host_can_answer(self._everyone) else self.device
        said = torch.zeros(2, len(places), dtype=torch.float32, device="cpu")
        for bucket in buckets:
            transformed = bucket.key.rule.transform is not None
            spread = {slot.number for slot in bucket.slots if transformed} & self._names.keys()
            columns = [index for index, number in enumerate(places) if number in spread]
            if spread:
                said[0, columns] = 1 + min(spread)
        said[1] = -said[0]
        greatest = said.to(device)
        agree(greatest, self._everyone)
        most, least = greatest.cpu().unbind()
        wrong = [self._names[places[index]] for index in (most != -least).nonzero().flatten()]
        if wrong:
            raise ConfigError(
                f"cannot update {', '.join(wrong[:5])}: some processes have a gradient of it and "
                "others have none, or one of another dtype, but directions are made of whole "
                "matrices; give all processes of its mesh a gradient, or none. Nothing was changed"
            )

    def complete(self, stage: Stage, found: Found) -> None:
        """Put in the place of what was found here what is so of the whole tensors."""
        if self._sums[stage].size:
            self._complete_sums(self._sums[stage], found)
        if stage == Stage.TENSORS and self._maxima.size:
            self._complete_maxima(found)

    def _complete_sums(self, reduction: Reduction, found: Found) -> None:
        vector = reduction.vector(self.device)
        moves = []
        for bucket, findings in found:
            begins = [reduction.begin.get(slot.number) for slot in bucket.slots]
            rows = [row for row, begin in enumerate(begins) if begin is not None]
            if findings.sums is None or not rows:
                continue
            index = torch.tensor(rows, **_WORDS).to(findings.sums.device)
            width = findings.sums.shape[1]
            starts = torch.tensor([b for b in begins if b is not None], **_WORDS)
            numbers = (starts[:, None] + torch.arange(width, **_WORDS)).to(self.device)
            vector[numbers] = findings.sums[index].to(self.device)
            moves.append((findings.sums, index, numbers))
        reduction.complete(vector)
        for sums, index, numbers in moves:
            sums[index] = vector[numbers].to(sums.device)

    def _complete_maxima(self, found: Found) -> None:
        vector = self._maxima.vector(self.device)
        moves = []
        for bucket, findings in found:
            for row, values in findings.maxima:
                begin = self._maxima.begin.get(bucket.slots[row].number)
                if begin is not None:
                    place = vector[begin : begin + values.numel()]
                    place.copy_(values.reshape(-1))
                    moves.append((values, place))
        self._maxima.complete(vector)
        for values, place in moves:
            values.copy_(place.view(values.shape))


def _sums(sharded: Sequence[Slot], stage: Stage) -> Reduction:
    sizes, groups = {}, {}
    for slot in sharded:
        layout = slot.layout
        needed = sums_of(layout.rule, layout.options).get(stage, 0)
        if layout.piece is not None and needed and layout.piece.sharding.cuts:
            sizes[slot.number], groups[slot.number] = needed, layout.piece.sharding.groups
    return Reduction(sizes, groups, maximum=False)


def _maxima(sharded: Sequence[Slot]) -> Reduction:
    sizes, groups = {}, {}
    for slot in sharded:
        number, piece, options = slot.number, slot.layout.piece, slot.layout.options
        states = len(slot.layout.rule.states)
        if piece is None or not piece.sharding.cuts:
            continue
        if options.tensor_wise:
            sizes[number], groups[number] = states, piece.sharding.groups
        elif options.cuts_blocks:
            sizes[number] = states * piece.scales.box.numel
            groups[number] = piece.scale_groups
    return Reduction(sizes, groups, maximum=True)
