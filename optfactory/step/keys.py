"""Which bucket each parameter belongs to, found out once for each kind of gradient it gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from optfactory.step.buckets import BucketKey, bucket_key
from optfactory.step.slots import Slot
from optfactory.step.usable import refuse_unusable


class Keys:
    """The key of each parameter's bucket, and that it can be updated at all.

    Kept for every parameter by itself: which of them have gradients may change at every step, as
    with mixtures of experts.
    """

    def __init__(self, slots: Sequence[Slot]) -> None:
        self._slots = slots
        self._facts: dict[int, tuple[object, ...]] = {}
        self._addresses: dict[int, int] = {}
        self._keys: dict[int, BucketKey] = {}
        self._same: dict[BucketKey, BucketKey] = {}  # one object for equal keys

    def learn(
        self,
        members: Sequence[int],
        gradients: Sequence[Tensor | None],
        facts: Sequence[tuple[object, ...]],
    ) -> list[int]:
        """Look at the parameters that are not what they were when they were last looked at.

        Args:
            members: numbers of the parameters that have a gradient.
            gradients: of all parameters.
            facts: of each member, as `Facts.by_member`.

        Returns:
            The address of each member.

        Raises:
            ConfigError: one of them cannot be updated with its gradient.
        """
        for index, fact in zip(members, facts, strict=True):
            if self._facts.get(index) != fact:
                self._look_at(index, gradients[index])
                self._facts[index] = fact
        locals_ = [self._slots[index].local for index in members]
        addresses = list(map(Tensor.data_ptr, locals_))
        for index, address in zip(members, addresses, strict=True):
            if self._addresses.get(index) != address:
                self._look_at(index, gradients[index])
                self._addresses[index] = address
        return addresses

    def _look_at(self, index: int, gradient: Tensor | None) -> None:
        assert gradient is not None
        slot = self._slots[index]
        refuse_unusable(slot, gradient)
        self._keys[index] = self._one(bucket_key(slot, gradient))

    def sorted(
        self, members: Sequence[int], turns: dict[int, int]
    ) -> list[tuple[BucketKey, list[int]]]:
        """The members of each bucket, in the order of turns."""
        found: dict[int, tuple[BucketKey, list[int]]] = {}
        for index in members:
            key = self._keys[index]
            if index in turns:
                key = self._one(replace(key, turn=turns[index]))
            found.setdefault(id(key), (key, []))[1].append(index)
        return sorted(found.values(), key=lambda item: item[0].turn)

    def _one(self, key: BucketKey) -> BucketKey:
        return self._same.setdefault(key, key)
