"""Tensors on the device that a test runs on, whichever the fixture `backend` chose."""

from __future__ import annotations

import torch
from torch import Generator, Tensor


def here(tensor: Tensor) -> Tensor:
    """A tensor on the default device; the same one if it is there."""
    return tensor.to(torch.get_default_device())


def randn(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Normal numbers on the default device; the same on every device."""
    return here(torch.randn(shape, generator=generator, device="cpu"))


def host(tensor: Tensor) -> Tensor:
    """A tensor on the CPU, with all that is still on its way to it."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # a step returns while pinned state is still copied
    return tensor.detach().cpu()


def is_managed(tensor: Tensor) -> bool:
    """Whether a tensor lies in CUDA managed memory."""
    if tensor.device.type != "cuda":
        return False
    from cupy.cuda import runtime

    attributes = runtime.pointerGetAttributes(tensor.data_ptr())
    return bool(attributes.type == runtime.memoryTypeManaged)
