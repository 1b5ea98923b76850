"""The same seed gives the same bits, for any number of threads and any company in a bucket."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from optfactory import Optimizer2State, build_optimizer
from optfactory.backends.cpu import tables as cpu
from tests.families import has_ratio
from tests.robustness.harness import (
    FAMILIES,
    NAMES,
    OPTIONS,
    Numbers,
    Shape,
    assert_same,
    everything,
)

# Several chunks of blocks, rows with a tail, one chunk, and far less; in no convenient order.
SHAPES: list[Shape] = [(33,), (100, 701), (5000,), (150_003,), (64, 70), (1,), (2100, 2)]
THREADS = (1, 2, 3, 5, 7, 7)
STEPS = 2
KINDS = ("normal", "decades", "all equal", "zero")

Gradients = list[list[torch.Tensor]]


@cache
def _values(dtype: torch.dtype) -> list[torch.Tensor]:
    return [Numbers(("normal",), 7, False).tensor(shape, dtype) for shape in SHAPES]


@cache
def _gradients(dtype: torch.dtype) -> Gradients:
    return [
        [Numbers(KINDS, 100 * step + i, True).tensor(s, dtype) for i, s in enumerate(SHAPES)]
        for step in range(STEPS)
    ]


def _optimizer(name: str, dtype: torch.dtype, **asked: Any) -> Optimizer2State:
    params = [p.clone().requires_grad_() for p in _values(dtype)]
    return build_optimizer(name, params, **asked)


def _train(optimizer: Optimizer2State, gradients: Gradients) -> dict[str, bytes]:
    for grads in gradients:
        for p, g in zip(optimizer.param_groups[0]["params"], grads, strict=True):
            p.grad = g
        optimizer.step()
    return everything(optimizer)


def assert_threads_do_not_matter(name: str, dtype: torch.dtype, **asked: Any) -> None:
    gradients, results = _gradients(dtype), []
    for threads in THREADS:
        torch.set_num_threads(threads)
        results.append(_train(_optimizer(name, dtype, **asked), gradients))
    for threads, result in zip(THREADS, results, strict=True):
        assert_same(result, results[0], f"{name}, {dtype}, {threads} threads")


@pytest.mark.parametrize("name", NAMES)
def test_same_bits_for_any_number_of_threads(name: str) -> None:
    assert_threads_do_not_matter(name, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [8, 32])
@pytest.mark.parametrize("family", FAMILIES)
def test_same_bits_of_16_bit_parameters(family: str, width: int, dtype: torch.dtype) -> None:
    assert_threads_do_not_matter(family, dtype, optim_bits=width)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_options_give_the_same_bits_for_any_number_of_threads(family: str, option: str) -> None:
    dtype, asked = OPTIONS[option]
    assert_threads_do_not_matter(family, dtype, **asked)


def _train_unevenly(optimizer: Optimizer2State, gradients: Gradients, alone: bool) -> None:
    """In each of three rounds another third of the tensors has no gradient."""
    for number in range(3):
        grads = gradients[number % STEPS]
        for i, (p, g) in enumerate(zip(optimizer.param_groups[0]["params"], grads, strict=True)):
            p.grad = g if (i + number) % 3 else None
            if alone:
                optimizer.step()
                p.grad = None
        if not alone:
            optimizer.step()


def assert_company_does_not_matter(name: str, dtype: torch.dtype, **asked: Any) -> None:
    """Alone, a tensor's chunks go to other threads; in a bucket, tensors are at unlike steps."""
    torch.set_num_threads(3)
    together, alone = (_optimizer(name, dtype, **asked) for _ in range(2))
    _train_unevenly(together, _gradients(dtype), alone=False)
    _train_unevenly(alone, _gradients(dtype), alone=True)
    assert_same(everything(alone), everything(together), f"{name}, {dtype}, alone")


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_gets_the_same_bits_in_any_company(name: str) -> None:
    assert_company_does_not_matter(name, torch.float32)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_options_give_a_tensor_the_same_bits_in_any_company(family: str, option: str) -> None:
    dtype, asked = OPTIONS[option]
    assert_company_does_not_matter(family, dtype, **asked)


def assert_chunks_do_not_matter(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, **asked: Any
) -> None:
    """But for the last bit of norms; these gradients have norms that are exact."""
    generator = torch.Generator().manual_seed(3)
    gradients = [
        [torch.randint(-8, 9, shape, generator=generator).to(dtype) for shape in SHAPES]
        for _ in range(2)
    ]
    want = _train(_optimizer(name, dtype, **asked), gradients)
    torch.set_num_threads(3)
    for elements in (1, 1000, 10**9):
        monkeypatch.setattr(cpu, "_CHUNK_NUMEL", elements)
        got = _train(_optimizer(name, dtype, **asked), gradients)
        assert_same(got, want, f"{name}, chunks of {elements}")


@pytest.mark.parametrize("name", [name for name in NAMES if not has_ratio(name)])
def test_chunks_of_another_size_give_the_same_bits(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_chunks_do_not_matter(monkeypatch, name, torch.float32)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("family", [family for family in FAMILIES if not has_ratio(family)])
def test_options_give_chunks_of_another_size_the_same_bits(
    family: str, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype, asked = OPTIONS[option]
    assert_chunks_do_not_matter(monkeypatch, family, dtype, **asked)
