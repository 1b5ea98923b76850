"""Which tensors are stepped, by which optimizers, and the least traffic that such a step needs."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

Shapes = list[tuple[int, ...]]


def gpt2_small() -> Shapes:
    """The parameter shapes of GPT-2 small, 124,439,808 elements in 148 tensors."""
    width = 768
    norm: Shapes = [(width,), (width,)]
    attention: Shapes = [(width, 3 * width), (3 * width,), (width, width), (width,)]
    mlp: Shapes = [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [(50257, width), (1024, width), *(norm + attention + norm + mlp) * 12, *norm]


def llama_7b() -> Shapes:
    """The parameter shapes of Llama 7B, 6,738,415,616 elements in 291 tensors."""
    width, hidden, tokens = 4096, 11008, 32000
    attention: Shapes = [(width, width)] * 4
    mlp: Shapes = [(hidden, width), (width, hidden), (hidden, width)]
    norms: Shapes = [(width,), (width,)]
    return [(tokens, width), *(attention + mlp + norms) * 32, (width,), (tokens, width)]


CASES: dict[str, tuple[str, Shapes]] = {
    "large": ("one tensor of 33.5 M elements", [(8192, 4096)]),
    "gpt2": ("GPT-2 small, 124 M elements", gpt2_small()),
    "small": ("1000 tensors of 64 and 200 of 64x64", [(64,)] * 1000 + [(64, 64)] * 200),
    "1m": ("one tensor of 1 M elements", [(1024, 1024)]),
    "100m": ("one tensor of 101 M elements", [(12288, 8192)]),
    "1b": ("one tensor of 1.01 B elements", [(32768, 30720)]),
    "llama7b": ("Llama 7B", llama_7b()),
    "small2000": (
        "1000 tensors of 64, 500 of 64x64, 300 of 1024 and 200 of 128x256",
        [(64,)] * 1000 + [(64, 64)] * 500 + [(1024,)] * 300 + [(128, 256)] * 200,
    ),
    "tiny": ("a few tensors, to try the script", [(64,)] * 10 + [(128, 256)] * 4),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TORCH = {"torch_fused": {"fused": True}, "torch_foreach": {"foreach": True}}
PEERS = {
    "bnb_adamw": ("bitsandbytes.optim", "AdamW"),
    "bnb_adamw8bit": ("bitsandbytes.optim", "AdamW8bit"),
    "bnb_paged_adamw8bit": ("bitsandbytes.optim", "PagedAdamW8bit"),
    "ao_adamw8bit": ("torchao.optim", "AdamW8bit"),
}
BASELINE = "torch_fused"


def is_installed(peer: str) -> bool:
    """Whether a peer's package is there."""
    return importlib.util.find_spec(PEERS[peer][0].partition(".")[0]) is not None


def is_for(name: str, case: str) -> bool:
    """Whether a case says something about an optimizer that it is not out of proportion for.

    Paged state moves over the bus, and torchao compiles anew for every shape.
    """
    return case in ("100m", "tiny") or not ("paged" in name or name.startswith("ao_"))


def fitting(case: str, dtype: str, room: float) -> Shapes:
    """The first tensors of a case for which `room` bytes are enough.

    Parameters, gradients, torch's states in their dtype, and a candidate's in float32.
    """
    each = 4 * DTYPES[dtype].itemsize + 8
    shapes: Shapes = []
    for shape in CASES[case][1]:
        room -= each * math.prod(shape)
        if room < 0:
            break
        shapes.append(shape)
    return shapes


def make_parameters(shapes: Shapes, dtype: str, device: str) -> list[Tensor]:
    """Parameters with gradients, the same ones every time."""
    generator = torch.Generator(device).manual_seed(0)
    parameters = []
    for shape in shapes:
        p, grad = (
            torch.empty(shape, dtype=DTYPES[dtype], device=device).normal_(
                std=std, generator=generator
            )
            for std in (0.02, 0.01)
        )
        p.requires_grad_().grad = grad
        parameters.append(p)
    return parameters


def make_optimizer(name: str, parameters: list[Tensor]) -> torch.optim.Optimizer:
    """One of TORCH, of PEERS, or an optfactory name, all with the same settings.

    The name of a paged optimizer may say in which memory: paged_adam8bit:pinned.
    """
    settings: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.01}
    if name in TORCH:
        return torch.optim.AdamW(parameters, **settings, **TORCH[name])
    if name in PEERS:
        module, kind = PEERS[name]
        return getattr(importlib.import_module(module), kind)(parameters, **settings)
    from optfactory import build_optimizer

    name, _, memory = name.partition(":")
    return build_optimizer(
        name, parameters, **settings, **({"page_memory": memory} if memory else {})
    )


def stored(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a tensor consists of; torchao's 8-bit states have several."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        yield tensor
        return
    for name in flatten()[0]:
        yield from stored(getattr(tensor, name))


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all state tensors; one that parameters share (a codebook) counts once."""
    tensors = {
        part.data_ptr(): part.numel() * part.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
        for part in stored(value)
    }
    return sum(tensors.values())


def least_bytes(name: str, parameters: list[Tensor], states: int) -> int:
    """Bytes that must move in a step: read p, g and the states, write p and the states.

    LAMB reads p, g and the states once more: it needs the norms of the whole tensor first.
    """
    size = sum(p.numel() * p.element_size() for p in parameters)
    read = 2 * size + states
    return read + size + states + (read if "lamb" in name else 0)


def count(parameters: list[Tensor]) -> int:
    """Number of elements."""
    return sum(math.prod(p.shape) for p in parameters)
