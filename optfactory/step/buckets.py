"""Buckets: parameters that one backend call updates together."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from optfactory.rules.language import UpdateRule
from optfactory.rules.options import KernelOptions, common_scalars
from optfactory.rules.passes import Stage, sums_of
from optfactory.step.slots import Slot

# Elements that kernels take at a time where state has no blocks.
UNIT = 256


@dataclass(frozen=True)
class BucketKey:
    """What the parameters of one bucket share: one kernel can update all of them."""

    device: torch.device
    parameter: torch.dtype
    gradient: torch.dtype
    rule: UpdateRule
    formats: tuple[str, ...]  # of the states
    block_size: int
    options: KernelOptions
    device_step: bool
    turn: int = 0  # parameters on the same memory are updated one after the other

    @cached_property
    def sums(self) -> dict[Stage, int]:
        """The passes that look at whole tensors before they can be updated; as `sums_of`."""
        return sums_of(self.rule, self.options)


def bucket_key(slot: Slot, gradient: Tensor) -> BucketKey:
    """The key of the bucket that updates a parameter, which shares its memory with no other."""
    p = slot.local
    has_blocks = slot.layout.quantized and not slot.layout.options.tensor_wise
    return BucketKey(
        p.device,
        p.dtype,
        gradient.dtype,
        slot.layout.rule,
        slot.layout.formats,
        slot.layout.grid.block_size if has_blocks else UNIT,
        slot.layout.options,
        slot.layout.device_step,
    )


@dataclass(eq=False)
class Bucket:
    """Parameters that one backend call updates together.

    Attributes:
        slots, gradients: the parameters, and this step's gradient of each; no gradients between
            steps.
        parameters: what this process holds of the parameters, which may move between steps.
        parameter_addresses, gradient_addresses: where they are in this step.
        grad_scale, found_inf: what a GradScaler handed over for this step: divide gradients by
            the one, change nothing if the other is not 0.
        strides: as `Facts.strides`, of this step's parameters and gradients.
        tables: what the backend keeps between steps while the slots stay the same.
        matrices: what `optfactory.step.scratch` keeps of it.
    """

    key: BucketKey
    slots: list[Slot]
    gradients: list[Tensor] = field(default_factory=list)
    parameters: list[Tensor] = field(default_factory=list)
    parameter_addresses: list[int] = field(default_factory=list)
    gradient_addresses: list[int] = field(default_factory=list)
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    strides: Any = None
    tables: Any = None
    matrices: Any = None

    def __post_init__(self) -> None:
        keys = list(self.slots[0].layout.tensors)
        # Of a single key it would be no tuple.
        self._entries = itemgetter(*(keys if len(keys) > 1 else keys * 2))
        # A slot of each group, and the numbers of its parameters; a bucket keeps them together.
        self._groups: list[tuple[Slot, range]] = []
        begin = 0
        for end, slot in enumerate(self.slots, start=1):
            if end == len(self.slots) or self.slots[end].group is not slot.group:
                self._groups.append((slot, range(begin, end)))
                begin = end

    @property
    def wrappers(self) -> list[Tensor]:
        """The DTensors around the parameters that are sharded."""
        return [s.parameter for s in self.slots if s.layout.piece is not None]

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The param groups of the parameters."""
        return [slot.group for slot, _ in self._groups]

    def state_tensors(self) -> list[Tensor]:
        """All state tensors, slot by slot.

        Raises:
            StateError: one is missing.
        """
        try:
            return list(chain.from_iterable(map(self._entries, [s.state for s in self.slots])))
        except KeyError:
            for slot in self.slots:
                slot.layout.check(slot.name, slot.state, slot.local.device)
            raise

    def scalar_rows(self, steps: list[float]) -> tuple[list[list[float]], list[int]]:
        """The distinct rows of scalars of this step, and the row of each slot.

        A row holds `rule.all_scalars` in order; slots share it when group and step are the same.
        """
        rows: list[list[float]] = []
        indices: list[int] = []
        names = self.key.rule.all_scalars
        for slot, members in self._groups:
            group = slot.group
            own = steps[members.start : members.stop]
            row_of = {}
            values = dict(group, lr=float(group["lr"]))
            for step in own[:1] if own.count(own[0]) == len(own) else dict.fromkeys(own):
                scalars = self._rule_scalars(slot, values, int(step))
                scalars |= common_scalars(group, step)
                row_of[step] = len(rows)
                rows.append([scalars[name] for name in names])
            if len(row_of) == 1:
                indices += [len(rows) - 1] * len(own)
            else:
                indices += map(row_of.__getitem__, own)
        return rows, indices

    def device_scalars(self, steps: Tensor) -> Tensor:
        """The scalars of each slot, computed where `steps` is, without waiting for it.

        Args:
            steps: each slot's step, float64.

        Returns:
            float32 [slots, scalars], in the order of `rule.all_scalars`.
        """
        names = self.key.rule.all_scalars
        table = torch.empty(len(self.slots), len(names), dtype=torch.float32, device=steps.device)
        for slot, members in self._groups:
            group = slot.group
            part = slice(members.start, members.stop)
            values = dict(group)
            if isinstance(group["lr"], Tensor):
                values["lr"] = group["lr"].to(steps.device, torch.float64, non_blocking=True)
            scalars = self._rule_scalars(slot, values, steps[part])
            scalars |= common_scalars(group, steps[part])
            for column, name in enumerate(names):
                table[part, column] = scalars[name]
        return table

    def _rule_scalars(self, slot: Slot, group: dict[str, Any], step: Any) -> dict[str, Any]:
        """What the schema of a parameter's family computes for its group."""
        return slot.schema.scalars(group, step)

    def must_skip(self) -> bool:
        """Whether the GradScaler found gradients that are not finite; waits for its device."""
        return self.found_inf is not None and float(self.found_inf) != 0
