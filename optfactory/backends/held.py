"""State tensors that tables of pointers point into."""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import is_
from typing import Any

from torch import Tensor

from optfactory.step.buckets import Bucket
from optfactory.step.slots import Slot


@dataclass(eq=False)
class Held:
    """The state tensors of one parameter, which a kernel may read and write.

    Attributes:
        tensors: held, so that the memory stays as long as something points to it.
        addresses: of each of them.
        row: what a backend's tables say of the parameter, as long as its state stays.
    """

    tensors: list[Tensor]
    addresses: list[int] = field(default_factory=list)
    row: Any = None


class HeldStates:
    """The state tensors of a bucket as tables point into them.

    Users may replace the tensors, or their memory under the same objects (`share_memory_`, `.data`,
    a queue between processes): kernels would go on with the old one. A parameter whose state is
    what it was in another bucket is not looked at again: buckets may be new at every step.

    Raises:
        StateError: a state tensor is missing, or is not what its layout allocates.
    """

    def __init__(self, bucket: Bucket) -> None:
        self._tensors = bucket.state_tensors()
        width = len(self._tensors) // len(bucket.slots)
        parts = [slice(n * width, (n + 1) * width) for n in range(len(bucket.slots))]
        for slot, part in zip(bucket.slots, parts, strict=True):
            own = self._tensors[part]
            if slot.held is None or not all(map(is_, slot.held.tensors, own)):
                slot.held = _checked(slot, own)
        self._addresses = list(map(Tensor.data_ptr, self._tensors))
        for slot, part in zip(bucket.slots, parts, strict=True):
            addresses = self._addresses[part]
            if slot.held.addresses and slot.held.addresses != addresses:
                slot.held = _checked(slot, slot.held.tensors)
            slot.held.addresses = addresses

    def are_those_of(self, bucket: Bucket) -> bool:
        """Whether the bucket's states are still these tensors, at the same addresses."""
        now = bucket.state_tensors()
        return (
            len(now) == len(self._tensors)
            and all(map(is_, now, self._tensors))
            and list(map(Tensor.data_ptr, now)) == self._addresses
        )


def _checked(slot: Slot, tensors: list[Tensor]) -> Held:
    """A note of a parameter's state, which fits it; addresses are not known yet."""
    slot.layout.check(slot.name, slot.state, slot.local.device)
    return Held(tensors)


def state_pointers(slot: Slot) -> list[int]:
    """The pointers of a parameter's states, then those of their scales; 0 without such."""
    keys = [codec.keys(state) for state, codec in slot.layout.stored]
    elements = [slot.state[names[0]].data_ptr() for names in keys]
    return elements + [slot.state[n[1]].data_ptr() if len(n) > 1 else 0 for n in keys]
