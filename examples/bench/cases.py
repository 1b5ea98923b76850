"""Which tensors are stepped, by which optimizers, and the least traffic that such a step needs."""

from __future__ import annotations

import math

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


CASES: dict[str, tuple[str, Shapes]] = {
    "large": ("one tensor of 33.5 M elements", [(8192, 4096)]),
    "gpt2": ("GPT-2 small, 124 M elements", gpt2_small()),
    "small": ("1000 tensors of 64 and 200 of 64x64", [(64,)] * 1000 + [(64, 64)] * 200),
    "tiny": ("a few tensors, to try the script", [(64,)] * 10 + [(128, 256)] * 4),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TORCH = {"torch_fused": {"fused": True}, "torch_foreach": {"foreach": True}}
PEERS = {"bnb_adamw": "AdamW", "bnb_adamw8bit": "AdamW8bit"}
BASELINE = "torch_fused"


def make_parameters(case: str, dtype: str, device: str) -> list[Tensor]:
    """Parameters with gradients, the same ones every time."""
    generator = torch.Generator(device).manual_seed(0)
    parameters = []
    for shape in CASES[case][1]:
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
    """One of TORCH, of PEERS, or an optfactory name, all with the same settings."""
    settings = {"lr": 1e-4, "weight_decay": 0.01}
    if name in TORCH:
        return torch.optim.AdamW(parameters, **settings, **TORCH[name])
    if name in PEERS:
        import bitsandbytes

        return getattr(bitsandbytes.optim, PEERS[name])(parameters, **settings)
    from optfactory import build_optimizer

    return build_optimizer(name, parameters, **settings)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all state tensors; one that parameters share (a codebook) counts once."""
    tensors = {
        value.data_ptr(): value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
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
