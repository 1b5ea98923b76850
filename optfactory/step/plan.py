"""One step's work: parameters with a gradient, in buckets that a backend runs at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from operator import is_, itemgetter
from typing import Any

from torch import Tensor

from optfactory.errors import ConfigError
from optfactory.memory.presence import turns_on_shared_memory, was_freed
from optfactory.sharding.dtensors import is_dtensor, local_tensor
from optfactory.sharding.gradients import local_gradient
from optfactory.step.buckets import Bucket, BucketKey
from optfactory.step.facts import Facts
from optfactory.step.gradients import computed
from optfactory.step.keys import Keys
from optfactory.step.scratch import Scratch
from optfactory.step.slots import Slot
from optfactory.step.states import LiveStates
from optfactory.step.usable import refuse_unusable

Picker = Callable[[list[Any]], Sequence[Any]]


class StepPlan:
    """Gathers buckets step by step, and keeps a bucket as long as its parameters stay."""

    def __init__(self, slots: Iterable[Slot]) -> None:
        self.slots = list(slots)
        self.parameters = [slot.parameter for slot in self.slots]
        self._sharded = [n for n, p in enumerate(self.parameters) if is_dtensor(p)]
        self._locals = list(map(local_tensor, self.parameters))
        self.devices = {p.device for p in self._locals}
        self.live = LiveStates(self.slots)
        self.scratch = Scratch(self.slots)
        self.exchange: Any = None  # what a backend's step keeps for processes to tell each other
        self._facts: Facts | None = None
        self._lazy: list[int] = []  # whose gradients are computed when they are read
        self._members: list[int] = []  # who have a gradient
        self._addresses: list[int] = []  # of these parameters
        self._current: list[tuple[Bucket, Picker]] = []
        self._keys = Keys(self.slots)
        self._buckets: dict[BucketKey, Bucket] = {}

    def is_of(self, groups: Iterable[Mapping[str, Any]]) -> bool:
        """Whether these are still the groups' parameters, in their order."""
        now = list(chain.from_iterable(group["params"] for group in groups))
        return len(now) == len(self.parameters) and all(map(is_, now, self.parameters))

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
        facts = self._facts if not moved else None
        steady = facts is not None and facts.hold(self._locals, gradients)
        if facts is None or not steady:
            self._facts = None
            self._refuse_freed(gradients)
            facts = Facts(self._locals, gradients)
            self._members = [index for index, g in enumerate(gradients) if g is not None]
            self._lazy = facts.lazy()
        for index in self._lazy:
            gradients[index] = computed(gradients[index])
        self._place(gradients, facts, steady)
        for bucket, pick in self._current:
            bucket.strides = facts.strides
            bucket.gradients = list(pick(gradients))
            bucket.gradient_addresses = list(map(Tensor.data_ptr, bucket.gradients))
            if 0 in bucket.gradient_addresses:
                for slot, gradient in zip(bucket.slots, bucket.gradients, strict=True):
                    refuse_unusable(slot, gradient)
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

    def _place(self, gradients: list[Tensor | None], facts: Facts, steady: bool) -> None:
        """Note where the parameters are, and sort them anew where that or something else changed.

        Args:
            steady: nothing else changed.
        """
        parameters = [self._locals[index] for index in self._members]
        if steady and list(map(Tensor.data_ptr, parameters)) == self._addresses:
            return
        members = self._members
        addresses = self._keys.learn(members, gradients, facts.by_member())
        turns = turns_on_shared_memory(parameters, addresses)
        in_turn = self._keys.sorted(members, {members[n]: turn for n, turn in turns.items()})
        self._current = []
        where = dict(zip(members, addresses, strict=True))
        for key, numbers in in_turn:
            bucket = self._bucket(key, numbers)
            bucket.parameters = list(map(self._locals.__getitem__, numbers))
            bucket.parameter_addresses = list(map(where.__getitem__, numbers))
            self._current.append((bucket, _picker(numbers)))
        self._addresses = addresses

    def _bucket(self, key: BucketKey, members: list[int]) -> Bucket:
        slots = [self.slots[index] for index in members]
        bucket = self._buckets.get(key)
        if bucket is None or bucket.slots != slots:
            bucket = self._buckets[key] = Bucket(key, slots)
        return bucket


def _picker(numbers: list[int]) -> Picker:
    """What takes the items of these numbers from a list."""
    pick = itemgetter(*numbers)
    return pick if len(numbers) > 1 else lambda items: (pick(items),)
