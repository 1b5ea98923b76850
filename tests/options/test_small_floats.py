"""fp8 and 4-bit state against formats written down here, and rounded by the documented hash."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from optfactory import build_optimizer
from optfactory.state.minifloats import MINIFLOATS
from tests.numerics.harness import array
from tests.reference.rounding import random_words

# States become the gradient and its square.
FORGETFUL: dict[str, Any] = {"betas": (0.0, 0.0), "eps": 1e-3, "lr": 1e-3}

# Magnitudes by code, in units of the largest.
E4M3 = [m / 8 * 2.0**-14 for m in range(8)]
E4M3 += [(1 + m / 8) * 2.0 ** (e - 15) for e in range(1, 16) for m in range(8)][:-1]  # NaN
E5M3 = [(1 + m / 8) * 2.0 ** (e - 31) for e in range(32) for m in range(8)]
E2M1 = [0.0, 0.125, 0.25, 0.375, 0.5, 0.75, 1.0, 1.5]
E3M1 = [(1 + m / 2) * 2.0 ** (e - 7) for e in range(8) for m in range(2)]
FORMATS = {"e4m3": E4M3, "e5m3": E5M3, "e2m1": E2M1, "e3m1": E3M1}
WIDTHS = {
    "fp8": ("_fp8", ("e4m3", "e5m3"), 256),
    "4bit": ("_q4", ("e2m1", "e3m1"), 128),
}
SHAPES = {"fp8": [(64, 512), (16, 301), (5001,)], "4bit": [(64, 512), (16, 302), (5002,)]}
CASES = [(width, shape) for width, shapes in SHAPES.items() for shape in shapes]


def codes_of(elements: torch.Tensor, width: str, shape: tuple[int, ...]) -> NDArray[np.int64]:
    """One for each element; of 4 bits the first of two is in the upper half of a byte."""
    stored = elements.numpy().astype(np.int64)
    if width == "4bit":
        stored = np.stack([stored >> 4, stored & 15], axis=-1)
    return stored.reshape(shape)


def scales_of(x: NDArray[np.float64], largest: float, size: int) -> NDArray[np.float32]:
    """By element: the greatest magnitude of its block by the format's largest number."""
    rows = x.reshape(x.shape[0] if x.ndim > 1 else 1, -1)
    scales = np.zeros(rows.shape, np.float32)
    for begin in range(0, rows.shape[1], size):
        part = np.abs(rows[:, begin : begin + size]).max(axis=1, keepdims=True)
        scales[:, begin : begin + size] = part.astype(np.float32) / np.float32(largest)
    return scales.reshape(x.shape)


def expected(
    x: NDArray[np.float64], name: str, size: int, words: NDArray[np.uint32], index: int
) -> NDArray[np.int64]:
    """The codes: one of both neighbours, the upper one if fraction and random number reach 1."""
    numbers, signed = np.array(FORMATS[name]), name in ("e4m3", "e2m1")
    cut = 20 if name in ("e4m3", "e5m3") else 22
    words = words & np.uint32(2**cut - 1) if index == 1 else words >> np.uint32(32 - cut)
    scales = scales_of(x, numbers[-1], size)
    reciprocals = np.float32(1) / np.where(scales > 0, scales, np.float32(1))
    y = x.astype(np.float32) * (reciprocals * np.float32(1 + 2.0**-22))
    sizes = np.abs(y)
    if signed:  # below the least normal number float32 rounds the sum with it
        least = np.float32(numbers[8 if name == "e4m3" else 2])
        sizes = np.where(sizes < least, (sizes + least) - least, sizes)
    sizes = np.clip(sizes.astype(np.float64), numbers[0], numbers[-1])
    below = np.minimum(np.searchsorted(numbers, sizes, side="right") - 1, len(numbers) - 2)
    fraction = (sizes - numbers[below]) / (numbers[below + 1] - numbers[below])
    codes = below + (fraction + words / 2.0**cut >= 1)
    sign = 1 << (7 if name == "e4m3" else 3)
    return np.where(signed & (y < 0) & (codes > 0), codes | sign, codes)


@pytest.mark.parametrize(("width", "shape"), CASES, ids=str)
def test_codes_are_those_of_the_rule(width: str, shape: tuple[int, ...], backend: str) -> None:
    p = torch.zeros(shape).requires_grad_()
    generator = np.random.default_rng(0)
    spread = generator.normal(size=shape) * 10 ** generator.uniform(-6, 3, size=shape)
    spread.reshape(-1)[:40:8] = 0.0
    p.grad = torch.from_numpy(spread).float()
    optimizer = build_optimizer(f"adam{width}", [p], seed=77, **FORGETFUL)
    optimizer.step()
    state, g = optimizer.state[p], array(p.grad)
    squares = (g.astype(np.float32) ** 2).astype(np.float64)
    suffix, formats, size = WIDTHS[width]
    for index, (name, x) in enumerate({"exp_avg": g, "exp_avg_sq": squares}.items()):
        words = random_words(77, 0, 1, x.size, 0).reshape(shape)  # those that states share
        got = codes_of(state[f"{name}{suffix}"].cpu(), width, shape)
        assert (got == expected(x, formats[index], size, words, index)).all(), name


@pytest.mark.parametrize("width", WIDTHS)
def test_the_mean_is_the_number(width: str, backend: str) -> None:
    """Over many seeds, of numbers that are not below the least one."""
    suffix, formats, _ = WIDTHS[width]
    g = torch.rand(64, 128, dtype=torch.float64).float() + 0.02
    g[:, 0] = 1.0
    means = np.zeros((2, 64, 128))
    for seed in range(1, 65):
        p = torch.zeros(64, 128).requires_grad_()
        p.grad = g.clone()
        optimizer = build_optimizer(f"adam{width}", [p], seed=seed, **FORGETFUL)
        optimizer.step()
        for index, name in enumerate(("exp_avg", "exp_avg_sq")):
            state = optimizer.state[p]
            codes = codes_of(state[f"{name}{suffix}"].cpu(), width, (64, 128))
            scales = array(state[f"{name}_scale"])
            means[index] += array_of(codes, formats[index]) * scales / 64
    for mean, x in zip(means, (array(g), array(g) ** 2), strict=True):
        assert abs(((mean - x) / x.mean()).mean()) < 2e-3


def array_of(codes: NDArray[np.int64], name: str) -> NDArray[np.float64]:
    """The numbers of codes, in the units of the format."""
    numbers = np.array(FORMATS[name])
    if name not in ("e4m3", "e2m1"):
        return numbers[codes]
    sign = 128 if name == "e4m3" else 8
    return np.where(codes & sign, -1.0, 1.0) * numbers[codes & (sign - 1)]


@pytest.mark.parametrize("name", FORMATS)
def test_the_numbers_of_all_codes(name: str) -> None:
    ours, theirs = MINIFLOATS[name], FORMATS[name]
    assert list(ours.values[: len(theirs)]) == theirs
    assert (ours.last_code, ours.largest) == (len(theirs) - 1, theirs[-1])
    assert ours.values[ours.one_code] == 1.0
    if ours.signed:
        assert [-x for x in theirs] == list(ours.values[ours.sign : ours.sign + len(theirs)])


def test_e4m3_is_that_of_torch() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    theirs = codes.view(torch.float8_e4m3fn).float() / 256
    ours = torch.tensor(MINIFLOATS["e4m3"].values)
    finite = theirs.isfinite()
    assert finite.sum() == 254
    assert torch.equal(ours[finite], theirs[finite])


@pytest.mark.parametrize("name", FORMATS)
def test_the_nearest_codes(name: str) -> None:
    """With which checkpoints are converted."""
    numbers, ours = np.array(FORMATS[name]), MINIFLOATS[name]
    x = torch.rand(20_000) * ours.largest
    x = torch.cat([x, x * 2.0 ** (-20 * torch.rand(20_000))])
    x = torch.cat([x, -x]) if ours.signed else x
    got = np.abs(array(torch.tensor(ours.values)[ours.nearest_codes(x).long()]))
    best = np.abs(np.abs(array(x))[:, None] - numbers[None]).min(axis=1)
    assert (np.abs(got - np.abs(array(x))) == best).all()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e18])
def test_sizes_do_not_matter(width: str, scale: float, backend: str) -> None:
    """Powers of two beside, all is the same."""
    scale = 2.0 ** round(np.log2(scale))
    found = []
    for factor in (1.0, scale):
        p = torch.zeros(16, 256).requires_grad_()
        generator = torch.Generator().manual_seed(0)
        p.grad = (torch.randn(16, 256, generator=generator, device="cpu") * factor).to(p.device)
        optimizer = build_optimizer(f"sgd{width}", [p], seed=3, momentum=0.9)
        optimizer.step()
        found.append(optimizer.state[p])
    suffix = WIDTHS[width][0]
    assert torch.equal(*(state[f"momentum_buffer{suffix}"] for state in found))
    first, other = (state["momentum_buffer_scale"] for state in found)
    assert torch.equal(first * scale, other)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("number", [float("inf"), float("nan"), -float("inf")])
def test_an_element_that_is_not_finite_starts_afresh(
    width: str, number: float, backend: str
) -> None:
    """And does not destroy its block's scale, as at 8 bits."""
    p = torch.zeros(4, 1024).requires_grad_()
    p.grad = torch.ones(4, 1024)
    p.grad[1, 100] = number
    optimizer = build_optimizer(f"adam{width}", [p], seed=1)
    optimizer.step()
    state, (suffix, formats, _) = optimizer.state[p], WIDTHS[width]
    codes = codes_of(state[f"exp_avg{suffix}"].cpu(), width, (4, 1024))
    values = array_of(codes, formats[0])
    assert values[1, 100] == 0.0
    values[1, 100] = values[0, 0]
    assert (values == values[0, 0]).all()
    scales = array(state["exp_avg_scale"])
    assert (scales == scales[0, 0]).all()


def test_bytes_a_parameter() -> None:
    p = torch.zeros(1024, 1024).requires_grad_()
    for name, size in (("adamw4bit", 2 * (0.5 + 4 / 128)), ("adamwfp8", 2 * (1 + 4 / 256))):
        report = build_optimizer(name, [p]).memory_report()
        assert report.state_bytes == size * p.numel() + 8


def test_rows_of_an_odd_number_of_elements_stay_at_32_bits() -> None:
    params = [torch.zeros(64, 101).requires_grad_(), torch.zeros(5001).requires_grad_()]
    for row in build_optimizer("adamw4bit", params).memory_report().rows:
        assert row.bits == 32
        assert "an odd number, and a byte holds two" in row.reason
