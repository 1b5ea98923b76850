"""One step's work: parameters with a gradient, in buckets that a backend runs at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from optfactory.config.schema import OptimizerConfig
from optfactory.errors import ConfigError
from optfactory.groups.parameters import parameter_problem
from optfactory.memory.presence import memory_problem, turns_on_shared_memory, was_freed
from optfactory.rules.language import UpdateRule
from optfactory.rules.options import KernelOptions, common_scalars
from optfactory.sharding.dtensors import is_dtensor, local_tensor
from optfactory.sharding.gradients import local_gradient
from optfactory.state.layout import LOSS_KEY
from optfactory.step.facts import Facts
from optfactory.step.gradients import computed, is_lazy
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
    quantized: bool
    block_size: int
    options: KernelOptions
    device_step: bool
    turn: int = 0  # parameters on the same memory are updated one after the other

    @property
    def needs_statistics(self) -> bool:
        """Whether something about whole tensors must be known before they can be updated."""
        return self.rule.trust_ratio is not None or self.options.scales_first


@dataclass(eq=False)
class Bucket:
    """Parameters that one backend call updates together.

    Attributes:
        slots, gradients: the parameters, and this step's gradient of each; no gradients between
            steps.
        parameters: what this process holds of the parameters, which may move between steps.
        parameter_addresses, gradient_addresses: where they are in this step.
        config_class: the schema that computes the scalars.
        grad_scale, found_inf: what a GradScaler handed over for this step: divide gradients by
            the one, change nothing if the other is not 0.
        strides: as `Facts.strides`, of this step's parameters and gradients.
        tables: what the backend keeps between steps while the slots stay the same.
    """

    key: BucketKey
    config_class: type[OptimizerConfig]
    slots: list[Slot]
    gradients: list[Tensor] = field(default_factory=list)
    parameter_addresses: list[int] = field(default_factory=list)
    gradient_addresses: list[int] = field(default_factory=list)
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    strides: Any = None
    tables: Any = None

    def __post_init__(self) -> None:
        self.parameters = [slot.local for slot in self.slots]
        keys = list(self.slots[0].layout.tensors)
        self._entries = itemgetter(*keys, *keys[: 2 - len(keys)])  # of one key it would be no tuple
        # The numbers of each group's parameters; a bucket keeps them together.
        self._groups: list[tuple[dict[str, Any], range]] = []
        begin = 0
        for end, slot in enumerate(self.slots, start=1):
            if end == len(self.slots) or self.slots[end].group is not slot.group:
                self._groups.append((slot.group, range(begin, end)))
                begin = end

    @property
    def wrappers(self) -> list[Tensor]:
        """The DTensors around the parameters that are sharded."""
        return [s.parameter for s in self.slots if s.layout.piece is not None]

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The param groups of the parameters."""
        return [group for group, _ in self._groups]

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
        for group, members in self._groups:
            own = steps[members.start : members.stop]
            row_of = {}
            values = dict(group, lr=float(group["lr"]))
            for step in own[:1] if own.count(own[0]) == len(own) else dict.fromkeys(own):
                scalars = self.config_class.scalars(values, int(step))
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
        for group, members in self._groups:
            part = slice(members.start, members.stop)
            values = dict(group)
            if isinstance(group["lr"], Tensor):
                values["lr"] = group["lr"].to(steps.device, torch.float64, non_blocking=True)
            scalars = self.config_class.scalars(values, steps[part])
            scalars |= common_scalars(group, steps[part])
            for column, name in enumerate(names):
                table[part, column] = scalars[name]
        return table

    def must_skip(self) -> bool:
        """Whether the GradScaler found gradients that are not finite; waits for its device."""
        return self.found_inf is not None and float(self.found_inf) != 0


class StepPlan:
    """Gathers buckets step by step, and keeps a bucket as long as its parameters stay."""

    def __init__(self, slots: Iterable[Slot], config_class: type[OptimizerConfig]) -> None:
        self.slots = list(slots)
        self.parameters = [slot.parameter for slot in self.slots]
        self._sharded = [n for n, p in enumerate(self.parameters) if is_dtensor(p)]
        self._locals = list(map(local_tensor, self.parameters))
        self.devices = {p.device for p in self._locals}
        self.parameter_ids = [id(p) for p in self.parameters]
        self.config_class = config_class
        self.states: list[dict[str, Tensor]] | None = None  # as last read by the optimizer
        self.exchange: Any = None  # what a backend's step keeps for processes to tell each other
        self._facts: Facts | None = None
        self._lazy: list[int] = []  # whose gradients are computed when they are read
        self._members: list[int] = []  # who have a gradient
        self._addresses: list[int] = []  # of these parameters
        self._current: list[tuple[Bucket, list[int]]] = []
        self._buckets: dict[BucketKey, Bucket] = {}

    def gather(self, change: Callable[[Tensor], Tensor] | None = None) -> list[Bucket]:
        """The buckets of all parameters that have a gradient now.

        Args:
            change: makes of each gradient what the step shall use instead.

        Raises:
            ConfigError: a gradient is sparse or of a dtype no kernel takes; nothing was changed.
        """
        gradients = self._local_gradients()
        moved = self._follow_locals()
        if change is not None:
            gradients = [None if g is None else change(g) for g in gradients]
        known = self._facts if not moved else None
        steady = known is not None and known.hold(self._locals, gradients)
        if not steady:
            self._facts = None
            self._refuse_freed(gradients)
            facts = Facts(self._locals, gradients)
            self._members = [index for index, g in enumerate(gradients) if g is not None]
            self._lazy = [index for index in self._members if is_lazy(gradients[index])]
        for index in self._lazy:
            gradients[index] = computed(gradients[index])
        self._place(gradients, steady)
        for bucket, members in self._current:
            bucket.strides = self._facts.strides if self._facts else None
            bucket.gradients = [gradients[index] for index in members]  # type: ignore[misc]
            bucket.gradient_addresses = list(map(Tensor.data_ptr, bucket.gradients))
            if 0 in bucket.gradient_addresses:
                for index in members:
                    _check(self.slots[index], gradients[index])
        if not steady:
            self._facts = facts
        return [bucket for bucket, _ in self._current]

    def _local_gradients(self) -> list[Tensor | None]:
        gradients = [p.grad for p in self.parameters]
        for index in self._sharded:
            gradients[index] = local_gradient(self.parameters[index], self.slots[index].name)
        return gradients

    def _refuse_freed(self, gradients: list[Tensor | None]) -> None:
        """Raise where an engine left a parameter behind, which would never be trained."""
        for slot, local, gradient in zip(self.slots, self._locals, gradients, strict=True):
            if gradient is None and local.requires_grad and was_freed(local):
                raise ConfigError(
                    f"cannot update {slot.name}: it has no gradient, and its memory was freed, as "
                    "another tensor took its place after the optimizer was built. FSDP2 puts whole "
                    "parameters into the model for a forward without a backward; build the "
                    "optimizer from the model itself, or call model.reshard() before"
                )

    def _follow_locals(self) -> bool:
        """Whether an engine swapped what this process holds of a parameter."""
        now = list(map(local_tensor, map(self.parameters.__getitem__, self._sharded)))
        moved = [
            n for n, local in zip(self._sharded, now, strict=True) if local is not self._locals[n]
        ]
        for index, local in zip(self._sharded, now, strict=True):
            self._locals[index] = local
        return bool(moved)

    def _place(self, gradients: list[Tensor | None], steady: bool) -> None:
        """Note where the parameters are, and sort them anew where that or something else changed.

        Args:
            steady: nothing else changed.
        """
        parameters = [self._locals[index] for index in self._members]
        if steady and list(map(Tensor.data_ptr, parameters)) == self._addresses:
            return
        for index in self._members:
            _check(self.slots[index], gradients[index])
        addresses = list(map(Tensor.data_ptr, parameters))
        turns = turns_on_shared_memory(parameters, addresses)
        self._current = self._sort(gradients, {self._members[n]: turn for n, turn in turns.items()})
        self._addresses = addresses
        where = dict(zip(self._members, addresses, strict=True))
        for bucket, members in self._current:
            bucket.parameters = [self._locals[index] for index in members]
            bucket.parameter_addresses = [where[index] for index in members]

    def _sort(
        self, gradients: list[Tensor | None], turns: Mapping[int, int]
    ) -> list[tuple[Bucket, list[int]]]:
        """Each bucket with the numbers of its parameters, in the order of turns."""
        found: dict[BucketKey, list[int]] = {}
        for index in self._members:
            key = _key(self.slots[index], gradients[index], turns.get(index, 0))
            found.setdefault(key, []).append(index)
        in_turn = sorted(found.items(), key=lambda item: item[0].turn)
        return [(self._bucket(key, members), members) for key, members in in_turn]

    def _bucket(self, key: BucketKey, members: list[int]) -> Bucket:
        slots = [self.slots[index] for index in members]
        bucket = self._buckets.get(key)
        if bucket is None or bucket.slots != slots:
            bucket = self._buckets[key] = Bucket(key, self.config_class, slots)
        return bucket


def _check(slot: Slot, gradient: Tensor | None) -> None:
    """Refuse a parameter that cannot be updated with this gradient."""
    problem = "" if gradient is None else _problem(slot, gradient)
    if problem:
        raise ConfigError(f"cannot update {slot.name}: {problem}")


def _key(slot: Slot, gradient: Tensor | None, turn: int) -> BucketKey:
    assert gradient is not None
    p = slot.local
    has_blocks = slot.layout.quantized and not slot.layout.options.tensor_wise
    return BucketKey(
        p.device,
        p.dtype,
        gradient.dtype,
        slot.layout.rule,
        slot.layout.quantized,
        slot.layout.grid.block_size if has_blocks else UNIT,
        slot.layout.options,
        slot.layout.device_step,
        turn,
    )


def _problem(slot: Slot, gradient: Tensor) -> str:
    """Why a parameter cannot be updated with this gradient; empty if it can."""
    p, layout = slot.local, slot.layout
    if gradient.layout is not torch.strided:
        return f"its gradient is sparse ({gradient.layout}); create the embedding with sparse=False"
    if gradient.dtype not in (p.dtype, torch.float32):
        return (
            f"its gradient has dtype {gradient.dtype}; "
            f"allowed are {p.dtype} (the parameter's) and torch.float32"
        )
    loss = layout.tensors.get(LOSS_KEY)
    if loss is not None and loss.dtype != p.dtype:
        return f"it is {p.dtype} now, and its state '{LOSS_KEY}' {loss.dtype}; keep its dtype"
    homes = layout.homes(slot.state, p.device)
    if {p.device, gradient.device, *homes} != {p.device}:
        state = ", ".join(map(str, homes))
        return (
            f"the parameter is on {p.device}, its gradient on {gradient.device}, its state on "
            f"{state}; move the model before its optimizer is built"
        )
    if not p.shape == gradient.shape == layout.local_shape:
        return (
            f"its shape is {tuple(p.shape)}, its gradient's {tuple(gradient.shape)}, its state was "
            f"made for {layout.local_shape}; after a resize along the first dimension call "
            "optimizer.replace_parameter(old, new), which carries its state over (old and new are "
            "the same where its data was replaced), else build a new optimizer"
        )
    problem = memory_problem(gradient)
    return (
        parameter_problem(slot.parameter)
        or memory_problem(p)
        or (problem and f"its gradient {problem}")
    )
