"""Tensors between guard bytes: writes outside of them do not stay unseen."""

from __future__ import annotations

from collections.abc import Sequence

import torch

_GUARD = 0xFE  # as floats huge or NaN, so that what is read from there shows too
_MARGIN = 1024  # a multiple of what every access may want as alignment
_POISON = 0xA5


class Guarded:
    """Makes tensors and checks later what lies around them.

    Tensors begin at a multiple of 64 bytes plus `offset` elements.
    """

    def __init__(self) -> None:
        self._buffers: list[tuple[str, torch.Tensor, int, int]] = []

    def empty(
        self, name: str, shape: Sequence[int], dtype: torch.dtype, offset: int = 0
    ) -> torch.Tensor:
        """A poisoned tensor, for what a kernel has to write."""
        numel = torch.Size(shape).numel()
        start = _MARGIN + offset * dtype.itemsize
        end = start + numel * dtype.itemsize
        buffer = torch.full((end + _MARGIN,), _GUARD, dtype=torch.uint8)
        assert buffer.data_ptr() % 64 == 0
        self._buffers.append((name, buffer, start, end))
        return poison(buffer[start:end].view(dtype).view(tuple(shape)))

    def copy(self, name: str, tensor: torch.Tensor, offset: int = 0) -> torch.Tensor:
        """A tensor with the values of another, for what a kernel reads or updates."""
        return self.empty(name, tensor.shape, tensor.dtype, offset).copy_(tensor)

    def check(self) -> None:
        """Raises AssertionError if anything was written around any of the tensors."""
        problems = []
        for name, buffer, start, end in self._buffers:
            changed = (buffer != _GUARD).nonzero().flatten()
            before, behind = changed[changed < start], changed[changed >= end]
            if before.numel():
                distance = start - int(before.max())
                problems.append(f"'{name}' was written {distance} bytes before its start")
            if behind.numel():
                distance = int(behind.min()) - end + 1
                problems.append(f"'{name}' was written {distance} bytes behind its end")
        assert not problems, "; ".join(problems)


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fill with NaN, or with bytes of 0xA5, what must not be read before it is written."""
    if tensor.is_floating_point():
        return tensor.fill_(float("nan"))
    tensor.view(torch.uint8).fill_(_POISON)
    return tensor
