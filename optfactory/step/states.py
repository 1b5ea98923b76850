"""The live state of each parameter, which users may empty or replace between two steps."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from operator import is_
from typing import Any

from torch import Tensor

from optfactory.step.settings import renew_noise
from optfactory.step.slots import Slot

States = MutableMapping[Tensor, dict[str, Any]]


class LiveStates:
    """Follows `optimizer.state`, which is read anew at every step."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self._slots = slots
        self._known: list[dict[str, Any]] | None = None  # of each slot
        self._keys: list[object] = []
        self._values: list[object] = []
        self._own: list[dict[str, Any]] = []  # states that slots have
        self._without: list[Slot] = []

    def follow(self, states: States, groups: Sequence[dict[str, Any]]) -> bool:
        """Give every slot the live state of its parameter, allocating what there is not yet.

        Returns:
            Whether there was no state at all.

        Raises:
            ConfigError, StateError: as `Slot.follow`.
        """
        if self._are_known(states):
            return False
        live = [states.get(slot.parameter) for slot in self._slots]
        emptied = []
        for index, (slot, entries) in enumerate(zip(self._slots, live, strict=True)):
            if self._known is not None and entries and entries is self._known[index]:
                continue
            if not slot.is_trained:
                slot.state = entries if entries and slot.holds_all(entries) else {}
                continue
            if slot.state and not entries:
                emptied.append(slot.group)
            slot.follow({} if entries is None else entries)
            states[slot.parameter] = slot.state
        renew_noise([group for group in groups if any(group is e for e in emptied)])
        self._note(states)
        return not any(live)

    def _are_known(self, states: Mapping[Tensor, dict[str, Any]]) -> bool:
        """Whether all is as it was noted; without hashing tensors, which takes long in Python."""
        return (
            self._known is not None
            and len(states) == len(self._keys)
            and all(map(is_, states, self._keys))
            and all(map(is_, states.values(), self._values))
            and all(self._own)
            and not any(slot.is_trained for slot in self._without)
        )

    def _note(self, states: Mapping[Tensor, dict[str, Any]]) -> None:
        self._known = [slot.state for slot in self._slots]
        self._keys, self._values = list(states), list(states.values())
        self._own = list(filter(None, self._known))
        self._without = [slot for slot in self._slots if not slot.state]
