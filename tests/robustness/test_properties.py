"""Any size, memory, dtype and gradient: results follow the references, only they are written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from optfactory import build_optimizer
from tests.numerics.harness import Twin
from tests.robustness.harness import (
    FAMILIES,
    NAMES,
    OPTIONS,
    REGIMES,
    Cut,
    Memory,
    Numbers,
    Shape,
    assert_same,
    dtypes,
    everything,
    examples,
    fence_states,
    memories,
    numbers,
    raw,
    shapes,
)

ORDINARY = ("normal", "decades", "all equal", "negative extreme")
# What a subnormal gradient moves a parameter of 0 by depends on the order of the operations.
BESIDE_ZERO = tuple(kind for kind in REGIMES if kind not in ("denormal", "smallest"))


@dataclass(frozen=True)
class Example:
    """One parameter: its shape, memory and values, and those of its gradients."""

    shape: Shape
    values: Numbers
    memory: Memory
    gradients: tuple[Numbers, ...]
    gradient_memory: Memory


@st.composite
def cases(draw: st.DrawFn, steps: int = 2) -> Example:
    shape, zeros = draw(shapes), draw(st.integers(0, 3)) == 3
    return Example(
        shape,
        draw(numbers(*ORDINARY, *(("zero",) if zeros else ()))),
        draw(memories(len(shape))),
        tuple(draw(numbers(*(BESIDE_ZERO if zeros else REGIMES))) for _ in range(steps)),
        draw(memories(len(shape))),
    )


several = st.lists(cases(), min_size=1, max_size=3)


def _tensors(found: list[Example], dtype: torch.dtype) -> tuple[list[Cut], list[list[Cut]]]:
    """The parameters, and their gradients step by step."""
    params = [case.memory.cut(case.values.tensor(case.shape, dtype)) for case in found]
    steps = [
        [case.gradient_memory.cut(case.gradients[step].tensor(case.shape, dtype)) for case in found]
        for step in range(len(found[0].gradients))
    ]
    return params, steps


def follow(name: str, found: list[Example], dtype: torch.dtype, **asked: Any) -> None:
    """Steps that the reference checks, with guards around all that a kernel may write."""
    params, steps = _tensors(found, dtype)
    twin = Twin(name, [nn.Parameter(cut.view) for cut in params], **asked)
    fences = fence_states(twin.optimizer)
    for number, gradients in enumerate(steps):
        before = [raw(g.view) for g in gradients]
        twin.step(number, [g.view for g in gradients])
        for g, kept in zip(gradients, before, strict=True):
            assert raw(g.view) == kept, "a gradient was written"
            g.assert_untouched_around("a gradient")
    for cut in params:
        cut.assert_untouched_around("a parameter")
    for what, cut in fences:
        cut.assert_untouched_around(what)


@pytest.mark.parametrize("name", NAMES)
@given(found=several, dtype=dtypes, least=st.sampled_from([1, 4096]))
@examples(12)
def test_follows_the_reference(
    name: str, found: list[Example], dtype: torch.dtype, least: int
) -> None:
    follow(name, found, dtype, min_8bit_size=least)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("family", FAMILIES)
@given(found=several)
@examples(8)
def test_options_follow_the_reference(family: str, option: str, found: list[Example]) -> None:
    dtype, asked = OPTIONS[option]
    follow(family, found, dtype, **asked)


def _run(name: str, params: list[Tensor], steps: list[list[Tensor]]) -> dict[str, bytes]:
    optimizer = build_optimizer(name, params, min_8bit_size=1)
    for gradients in steps:
        for p, g in zip(params, gradients, strict=True):
            p.grad = g
        optimizer.step()
    return everything(optimizer)


@pytest.mark.parametrize("name", NAMES)
@given(found=several, dtype=dtypes)
@examples(6)
def test_memory_does_not_change_a_bit(name: str, found: list[Example], dtype: torch.dtype) -> None:
    """Vector instructions, unrolled loops and their rests begin elsewhere for other addresses."""
    params, steps = _tensors(found, dtype)
    plain = [cut.view.clone(memory_format=torch.contiguous_format) for cut in params]
    same = [[g.view.clone(memory_format=torch.contiguous_format) for g in s] for s in steps]
    want = _run(name, [p.requires_grad_() for p in plain], same)
    views = [[g.view for g in gradients] for gradients in steps]
    got = _run(name, [nn.Parameter(cut.view) for cut in params], views)
    assert_same(got, want, name)
