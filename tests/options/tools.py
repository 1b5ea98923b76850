"""What the tests of options share: runs to compare bit by bit, checkpoints, refusals."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from optfactory import Optimizer2State, build_optimizer
from optfactory.errors import ConfigError
from tests.families import ELEMENT_WISE, FAMILIES
from tests.numerics.harness import bits, gradient, parameters

# Blocks that end inside, a row with a short last block, state too small for 8 bits, short rows.
SHAPES: list[tuple[int, ...]] = [(4097,), (33, 300), (255,), (64, 8, 3, 3), (2100, 2)]
SMALL: list[tuple[int, ...]] = [(20, 300), (100,)]

families = pytest.mark.parametrize("family", FAMILIES)
element_wise = pytest.mark.parametrize("family", ELEMENT_WISE)
widths = pytest.mark.parametrize("width", [32, 8])
halves = pytest.mark.parametrize("dtype", ["fp16", "bf16"])

Seen = dict[str, Any]


def seen(optimizer: Optimizer2State) -> Seen:
    """The bytes of all parameters and states."""
    found: Seen = {}
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for number, p in enumerate(params):
        found[f"p{number}"] = bits(p).tobytes()
        for key, tensor in optimizer.state[p].items():
            found[f"p{number}.{key}"] = bits(tensor).tobytes()
    return found


def train(optimizer: Optimizer2State, steps: Iterable[int], scale: float = 1.0) -> None:
    """Steps with gradients that depend on the step's number and the parameter's place only."""
    for step in steps:
        for number, p in enumerate(q for group in optimizer.param_groups for q in group["params"]):
            g = gradient(tuple(p.shape), torch.float32, 1000 * step + number)
            p.grad = (scale * g).to(p.dtype)
        optimizer.step()


def trained(
    name: str,
    dtype: torch.dtype = torch.float32,
    shapes: list[tuple[int, ...]] = SMALL,
    steps: int = 3,
    **asked: Any,
) -> Seen:
    """What is left of some steps under a configuration."""
    optimizer = build_optimizer(name, parameters(dtype, shapes), **asked)
    train(optimizer, range(steps))
    return seen(optimizer)


def assert_threads_do_not_matter(name: str, shapes: list[tuple[int, ...]], **asked: Any) -> None:
    """The same bits from one thread and from two."""
    results = []
    for threads in (1, 2):
        optimizer = build_optimizer(name, parameters(torch.float32, shapes), **asked)
        for step in range(3):
            torch.set_num_threads(1)  # torch's own 10 ** x depends on how it splits its work
            for number, p in enumerate(optimizer.param_groups[0]["params"]):
                p.grad = gradient(tuple(p.shape), p.dtype, 10 * step + number)
            torch.set_num_threads(threads)
            optimizer.step()
        results.append(seen(optimizer))
    assert results[0] == results[1]


def without(found: Seen, key: str) -> Seen:
    """All but one state."""
    return {name: value for name, value in found.items() if not name.endswith(f".{key}")}


def assert_resumes(
    name: str,
    dtype: torch.dtype = torch.float32,
    shapes: list[tuple[int, ...]] = SMALL,
    **asked: Any,
) -> Seen:
    """Stopping after three steps, saving, loading and going on changes no bit."""
    whole = trained(name, dtype, shapes, steps=6, **asked)
    first = build_optimizer(name, parameters(dtype, shapes), **asked)
    train(first, range(3))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    trained_ones = [p for group in first.param_groups for p in group["params"]]
    params = [p.detach().clone().requires_grad_() for p in trained_ones]
    second = build_optimizer(name, params, **asked)
    second.load_state_dict(torch.load(file, weights_only=True))
    train(second, range(3, 6))
    assert seen(second) == whole
    return whole


def assert_refused(match: str, name: str, params: list[Tensor] | None = None, **asked: Any) -> None:
    """The configuration is refused, and the message names the field."""
    params = [torch.zeros(4, 8, requires_grad=True)] if params is None else params
    with pytest.raises(ConfigError, match=match):
        build_optimizer(name, params, **asked)


def moved(before: list[Tensor], after: list[Tensor]) -> bool:
    """Whether any parameter differs."""
    return any((bits(a) != bits(b)).any() for a, b in zip(before, after, strict=True))


def copies(params: list[Tensor]) -> list[Tensor]:
    """Parameters as they are now."""
    return [p.detach().clone() for p in params]


def mask_of(shape: tuple[int, ...], seed: int, share: float = 0.1) -> torch.Tensor:
    """True at random places."""
    return torch.from_numpy(np.random.default_rng(seed).random(shape) < share)
