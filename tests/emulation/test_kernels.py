"""The CUDA kernels against float64 references and against the native CPU backend.

All memory that a kernel is given lies between guard bytes, and mostly off its natural alignment.
"""

from __future__ import annotations

import pytest
import torch

from tests.emulation.bench import Bench
from tests.emulation.harness import CASES, PAIRS, Shape, emulator, needs_fma
from tests.numerics.harness import gradient
from tests.unit.harness import BLOCK_SIZES, needs_compiler

pytestmark = [needs_compiler, needs_fma]

SHAPES: list[Shape] = [
    (1,), (255,), (257,), (4095,), (4097,), (70, 64), (33, 300), (64, 8, 3, 3),
]  # fmt: skip
STEPS = 3

QUANTIZED = [label for label, case in CASES.items() if case.width == 8]


def test_every_rule_is_found() -> None:
    rules = {label.split("-", 1)[1] for label in CASES}
    assert {"adam-None-8", "adam-None-32", "adam_amsgrad-None-32"} <= rules
    for ratio in ("lamb", "clip"):
        assert {f"lamb-{ratio}-8", f"lamb-{ratio}-32", f"lamb_amsgrad-{ratio}-32"} <= rules


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("label", CASES)
def test_steps_follow_the_reference_and_the_native_backend(label: str, pair: str) -> None:
    case = CASES[label]
    cuda, driver = emulator(blocks=3)
    bench = Bench(case, PAIRS[pair], SHAPES, cuda)
    # Compiling native kernels with norms takes longer than all the rest: how 16-bit numbers are
    # read and stored, the rules without norms show.
    is_compared = case.is_elementwise or pair == "fp32"
    if is_compared:
        bench.compile()
    moved = [False] * len(bench.params)
    for step in range(STEPS):
        before = bench.before()
        bench.new_gradients(step)
        bench.step()
        if is_compared:
            bench.compare(before)
        for index, (p, old) in enumerate(zip(bench.params, before, strict=True)):
            moved[index] |= not torch.equal(p, old)  # steps of one size may lead back
    assert all(moved)
    updates = [blocks for kernel, blocks in driver.launches if kernel == "optfactory_update"]
    assert 3 in updates  # all resident blocks, for more chunks than that
    if case.width == 8:
        bench.twin.count.check()


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_block_sizes(block_size: int) -> None:
    """Blocks of a few threads up to all of them, the last of a row being short."""
    shapes: list[Shape] = [(block_size,), (2 * block_size + 65,), (5, block_size + 100), (9, 64)]
    bench = Bench(
        CASES["adam-adam-None-8"], PAIRS["fp32"], shapes, emulator()[0], block_size=block_size
    )
    bench.compile()
    for step in range(STEPS):
        before = bench.before()
        bench.new_gradients(step)
        bench.step()
        bench.compare(before)
    bench.twin.count.check()


def _spoil(grad: torch.Tensor, step: int) -> None:
    """Single bad elements, and whole blocks of them, at other places in each step."""
    flat = grad.view(-1)
    numbers = [float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 1e20, 1e-40, -1e-45, -0.0]
    for index, number in enumerate(numbers):
        flat[257 * index + 11 * step] = number
    end = len(flat)
    flat[end - 300 :] = [1e-44, 3e38, float("inf")][step % 3]
    flat[end - 1] = [float("nan"), 1e-30, -1e30][step % 3]


@pytest.mark.parametrize("label", QUANTIZED)
def test_bad_gradients_at_8_bits(label: str) -> None:
    bench = Bench(CASES[label], PAIRS["fp32"], [(4097,), (33, 300)], emulator()[0])
    for step in range(4):
        before = bench.before()
        bench.new_gradients(step)
        for index, grad in enumerate(bench.grads):
            if index % 5 != step:  # some tensors are spoilt later than others
                _spoil(grad, step)
        bench.step()
        bench.compare(before)
    for state in bench.optimizer.state.values():
        scales = [tensor for key, tensor in state.items() if key.endswith("_absmax")]
        assert all(scale.isfinite().all() for scale in scales)


@pytest.mark.parametrize("label", QUANTIZED)
def test_scales_of_all_magnitudes_at_8_bits(label: str) -> None:
    """From subnormal to overflowing squares, one magnitude per row."""
    bench = Bench(CASES[label], PAIRS["fp32"], [(43, 300)], emulator()[0])
    magnitude = 10.0 ** torch.arange(-45.0, 41.0, 2.0, dtype=torch.float64)[:, None]
    for step in range(STEPS):
        before = bench.before()
        for index, grad in enumerate(bench.grads):
            shape = tuple(grad.shape)
            grad.copy_(gradient(shape, torch.float64, 100 * step + index) * magnitude)
        bench.step()
        bench.compare(before)
