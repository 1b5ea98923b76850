"""Tensors beside memory that must not be touched: reads outside of them do not stay unseen."""

from __future__ import annotations

import ctypes
import mmap

import torch

_libc = ctypes.CDLL(None, use_errno=True)
_NO_ACCESS = 0  # PROT_NONE, which Python's mmap names from 3.13 on only


def fenced(tensor: torch.Tensor, side: str) -> torch.Tensor:
    """A contiguous copy of a tensor that ends before, or begins behind, an inaccessible page.

    Args:
        side: where the page is: ``before`` the tensor or ``behind`` it.
    """
    page = mmap.PAGESIZE
    nbytes = tensor.numel() * tensor.element_size()
    room = -(-nbytes // page) * page
    region = mmap.mmap(-1, room + page)
    start = page if side == "before" else room - nbytes
    barrier = 0 if side == "before" else room
    address = ctypes.addressof(ctypes.c_char.from_buffer(region)) + barrier
    if _libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(page), _NO_ACCESS) != 0:
        raise OSError(ctypes.get_errno(), "mprotect failed")
    copy = torch.frombuffer(region, dtype=torch.uint8, offset=start, count=nbytes)
    return copy.view(tensor.dtype).view(tensor.shape).copy_(tensor)
