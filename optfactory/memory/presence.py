"""Tensors that a kernel cannot reach, and tensors that lie on the same memory."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from operator import le

from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def memory_problem(tensor: Tensor) -> str:
    """Why a tensor has no memory of its own to read and write; empty if it has."""
    if is_traceable_wrapper_subclass(tensor):
        return f"is a {type(tensor).__name__}, which has no memory of its own"
    if type(tensor).__name__ == "FakeTensor":  # whose pointer torch warns of
        return "is a FakeTensor, which has a shape and no data"
    if tensor.numel() == 0:
        return ""
    try:
        address = tensor.data_ptr()
    except RuntimeError:  # tensors of functorch
        address = 0
    if address == 0:
        return f"has no data (it is on {tensor.device}, or its storage was freed)"
    nbytes = tensor.storage_offset() * tensor.itemsize + extent(tensor)
    if tensor.untyped_storage().nbytes() < nbytes:
        return "is larger than its storage, which was made smaller"
    return ""


def was_freed(tensor: Tensor) -> bool:
    """Whether a tensor has elements, and a storage that was made empty; cheap."""
    return type(tensor) in (Tensor, Parameter) and not (
        tensor.untyped_storage().nbytes() or tensor.numel() == 0
    )


def extent(tensor: Tensor) -> int:
    """Bytes from a tensor's first to its last element."""
    if tensor.is_contiguous():
        return tensor.nbytes
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return (1 + sum((size - 1) * stride for size, stride in pairs)) * tensor.itemsize


def turns_on_shared_memory(tensors: Sequence[Tensor], addresses: Sequence[int]) -> dict[int, int]:
    """Which tensors must not be written at once, because they lie on the same memory.

    Returns:
        For the number of a tensor that overlaps others, its turn: 1, 2, ... in the given order
        behind the first one, which is not listed.
    """
    sizes = list(map(extent, tensors))
    order = sorted(compress(range(len(tensors)), sizes), key=addresses.__getitem__)
    ends = [addresses[index] + sizes[index] for index in order]
    if all(map(le, ends, map(addresses.__getitem__, order[1:]))):
        return {}
    turns: dict[int, int] = {}
    cluster: list[int] = []
    end = 0
    for index, last in zip(order, ends, strict=True):
        if cluster and addresses[index] >= end:
            turns |= _turns_of(cluster)
            cluster = []
        end = max(end, last) if cluster else last
        cluster.append(index)
    return turns | _turns_of(cluster)


def _turns_of(cluster: list[int]) -> dict[int, int]:
    return {member: turn for turn, member in enumerate(sorted(cluster)) if turn}
