"""Tools of the torch API tests: parameters, gradients, snapshots and mappings of tensors."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from optfactory import Optimizer2State, build_optimizer
from tests.devices import host, is_managed, randn
from tests.families import suited

# Three with 8-bit state under 8-bit names, three too small or with too short rows for it.
SHAPES: list[tuple[tuple[int, ...], torch.dtype]] = [
    ((20, 300), torch.float32),
    ((4097,), torch.bfloat16),
    ((64, 70), torch.float32),
    ((255,), torch.float32),
    ((1400, 3), torch.float32),
    ((), torch.float32),
]


def parameters(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [randn(shape, generator).to(dtype).requires_grad_() for shape, dtype in SHAPES]


def own_parameters(name: str) -> list[Tensor]:
    """Those of the parameters that an optimizer trains by its own rule."""
    found = parameters()
    fitting = suited(name, [tuple(p.shape) for p in found])
    return [p for p in found if tuple(p.shape) in fitting]


def weight(*shape: int, value: float = 1.0) -> Tensor:
    return torch.full(shape or (300,), value).requires_grad_()


def held(optimizer: Optimizer) -> list[Tensor]:
    """All parameters of an optimizer in order."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def train(optimizer: Optimizer, steps: range) -> None:
    """Steps with gradients that depend on the step's number and the parameter's place only."""
    for step in steps:
        for index, p in enumerate(held(optimizer)):
            generator = torch.Generator().manual_seed(1000 * step + index)
            p.grad = randn(p.shape, generator).to(p.device, p.dtype)
        optimizer.step()


def trained(name: str, steps: int = 3, **options: Any) -> Optimizer2State:
    """An optimizer of the standard parameters after some steps."""
    optimizer = build_optimizer(name, own_parameters(name), **options)
    train(optimizer, range(steps))
    return optimizer


def clones(params: list[Tensor]) -> list[Tensor]:
    """Trainable copies."""
    return [p.detach().clone().requires_grad_(p.requires_grad) for p in params]


def through_file(value: Any) -> Any:
    """What torch.load(weights_only=True) gives of what torch.save wrote."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def bits(tensor: Tensor) -> bytes:
    return host(tensor).reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


def snapshot(optimizer: Optimizer) -> dict[str, Any]:
    """Everything that a failed call must leave alone: bits, places and settings."""
    params = held(optimizer)
    return {
        "params": [(id(p), p.data_ptr(), bits(p)) for p in params],
        "states": [
            {key: _facts(value) for key, value in optimizer.state[p].items()}
            for p in params
            if p in optimizer.state
        ],
        "groups": [
            {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ],
    }


def _facts(value: Any) -> Any:
    """What tells a value of `optimizer.state` from another; wrappers keep more than tensors."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_meta:
        return repr(value)
    return value.data_ptr(), value.dtype, bits(value)


def assert_same_training(one: Optimizer, other: Optimizer) -> None:
    """Parameters, states and hyperparameters of two optimizers are equal, bit for bit."""
    for index, (p, q) in enumerate(zip(held(one), held(other), strict=True)):
        assert bits(p) == bits(q), f"parameter {index}"
        assert list(one.state[p]) == list(other.state[q])
        for key, value in one.state[p].items():
            assert value.dtype == other.state[q][key].dtype, (index, key)
            assert value.shape == other.state[q][key].shape, (index, key)
            assert bits(value) == bits(other.state[q][key]), (index, key)


def mapping_of(tensor: Tensor) -> str:
    """The line of /proc/self/maps that a tensor's memory lies in."""
    address = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(end, 16) for end in line.split(" ", 1)[0].split("-"))
        if first <= address < last:
            return line
    raise AssertionError(f"no mapping holds {address:#x}")


def is_file_mapped(tensor: Tensor) -> bool:
    """Whether a tensor lies in a shared mapping of one of optfactory's files."""
    line = mapping_of(tensor)
    return "optfactory-" in line and line.split()[1][3] == "s"


def is_paged(tensor: Tensor) -> bool:
    """Whether a tensor lies where it makes room for other data, on CPUs and on GPUs."""
    if tensor.device.type == "cuda":
        return is_managed(tensor)
    return tensor.is_pinned() or is_file_mapped(tensor)
