"""AdEMAMix's `state1` in bitsandbytes: the fast and the slow average, one behind the other.

>>> import torch
>>> entries = {"state1[0]": torch.zeros(3), "state1[1]": torch.ones(3)}
>>> join(entries)["state1"].shape
torch.Size([2, 3])
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from optfactory.checkpoints.fields import Fields

# What the halves are called while they are read and written.
HALVES = ("1[0]", "1[1]")

_KEPT_TWICE = ("state", "absmax")


def split(fields: Fields, shape: tuple[int, ...], block_size: int) -> bool:
    """Put the halves beside the other fields; False if a problem was noted."""
    before = len(fields.problems)
    for stem in _KEPT_TWICE:
        value = fields.peek(f"{stem}1")
        if not isinstance(value, Tensor) or value.ndim == 0 or len(value) != 2:
            if value is not None or stem == "state":
                fields.note(f"{stem}1", "expected a tensor with AdEMAMix's two averages")
            continue
        if stem == "state" and not value.is_contiguous():
            fields.note("state1", "is not contiguous; put it in order with .contiguous()")
        fields.ignore(f"{stem}1")
        for half, part in zip(HALVES, value, strict=True):
            fields.replace(f"{stem}{half}", part)
    qmap = fields.peek("qmap1")
    fields.ignore("qmap1")
    if isinstance(qmap, Tensor):
        for half in HALVES:
            fields.replace(f"qmap{half}", qmap)
        if math.prod(shape) % block_size and _collided(fields, qmap, block_size):
            fields.note(
                "absmax1",
                "has lost a scale: on GPUs bitsandbytes keeps those of the fast average's last and "
                "of the slow one's first block in one place if the number of elements, here "
                f"{math.prod(shape)}, is no multiple of {block_size}; start with fresh state",
            )
    return len(fields.problems) == before


def _collided(fields: Fields, qmap: Tensor, block_size: int) -> bool:
    """Whether the slow average's scales begin one place too early.

    Then nothing wrote to the last one, which is 0, unlike the fast average's. And if all of the
    last block is 0, the one before has its scale, but codes of more. Blocks of zeros have codes 0
    (CPUs, Triton, from a division by 0) or those that mean 0.
    """
    codes, slow = fields.peek(f"state{HALVES[1]}"), fields.peek(f"absmax{HALVES[1]}")
    fast = fields.peek(f"absmax{HALVES[0]}")
    if not isinstance(codes, Tensor) or codes.dtype != torch.uint8 or len(qmap) != 256:
        return False
    codes = torch.nn.functional.pad(codes.reshape(-1), (0, -codes.numel() % block_size))
    codes = codes.view(-1, block_size)
    if not isinstance(slow, Tensor) or not isinstance(fast, Tensor) or slow.shape != (len(codes),):
        return False
    if slow[-1] == 0 and fast[-1] != 0:
        return True
    moved = (codes != 0) & (qmap != 0).to(codes.device)[codes.int()]
    return bool((moved.any(dim=1) & (slow.to(codes.device) == 0)).any())


def join(entries: dict[str, Any]) -> dict[str, Any]:
    """The halves as bitsandbytes keeps them; they share a map."""
    joined = dict(entries)
    for stem in ("state", "absmax", "qmap"):
        halves = [joined.pop(f"{stem}{half}") for half in HALVES if f"{stem}{half}" in joined]
        if halves:
            joined[f"{stem}1"] = halves[0] if stem == "qmap" else torch.stack(halves)
    return joined
