"""How often kernels are launched, and that their results depend on nothing but the tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from optfactory import Optimizer2State, build_optimizer
from optfactory.backends.cuda import tables as cuda_tables
from tests.emulation.driver import EmulatedDriver
from tests.emulation.harness import (
    NATIVE,
    Shape,
    assert_close_steps,
    assert_same,
    assert_same_states,
    copy_training,
    emulator,
    give_gradients,
    held,
    is_same,
    needs_fma,
    on,
    values,
)
from tests.unit.harness import needs_compiler

pytestmark = needs_compiler

NAMES = ["adam32bit", "adam8bit", "lamb32bit", "lamb8bit"]
PASSES = {
    "adam": {"optfactory_update": 1},
    "lamb": {
        "optfactory_statistics": 1,
        "optfactory_gather": 1,
        "optfactory_finalize": 1,
        "optfactory_update": 1,
    },
}
MIXED: list[Shape] = [(1,), (300,), (33, 300), (9000,), (70, 64), (64, 8, 3, 3), (40_000,)]


def build(name: str, shapes: Sequence[Shape], **asked: Any) -> Optimizer2State:
    params = [values(shape, torch.float32, i).requires_grad_() for i, shape in enumerate(shapes)]
    return build_optimizer(name, params, **asked)


def passes(driver: EmulatedDriver) -> dict[str, int]:
    """How often each kernel was launched that is not one of the tables'."""
    counts = Counter(kernel for kernel, _ in driver.launches)
    return {kernel: n for kernel, n in counts.items() if kernel != "optfactory_write"}


def writes(driver: EmulatedDriver) -> int:
    return [kernel for kernel, _ in driver.launches].count("optfactory_write")


def refill_gradients(optimizer: Optimizer2State, seed: int) -> None:
    """New gradients where the old ones are."""
    with torch.no_grad():
        for index, p in enumerate(held(optimizer)):
            generator = torch.Generator().manual_seed(1000 * seed + index)
            p.grad.copy_(torch.randn(p.shape, generator=generator))


# ---- launches --------------------------------------------------------------------------------


@needs_fma
@pytest.mark.parametrize("count", [1, 10, 600])
@pytest.mark.parametrize("name", NAMES)
def test_a_pass_is_one_launch_whatever_the_number_of_tensors(name: str, count: int) -> None:
    backend, driver = emulator()
    shapes: list[Shape] = [(64 + i % 3,) for i in range(count)]
    optimizer, native = (build(name, shapes, min_8bit_size=1) for _ in range(2))
    for step in range(2):
        before = [p.detach().clone() for p in held(optimizer)]
        give_gradients(optimizer, step)
        give_gradients(native, step)
        driver.launches.clear()
        with on(backend):
            optimizer.step()
        with on(NATIVE):
            native.step()
        assert passes(driver) == PASSES[name[:4]]
        assert_same_states(optimizer, native)
        for p, q, old in zip(held(optimizer), held(native), before, strict=True):
            assert_close_steps(p, q, old)
        copy_training(optimizer, native)


def test_each_bucket_is_launched_once() -> None:
    backend, driver = emulator()
    shapes: list[Shape] = [(300,), (64, 70), (80, 80), (200,)]  # two of 8 and two of 32 bits
    params = [values(shape, torch.float32, i) for i, shape in enumerate(shapes)]
    params += [values((64, 70), torch.bfloat16, 9)]
    optimizer = build_optimizer("adam8bit", [p.requires_grad_() for p in params])
    give_gradients(optimizer, 0)
    with on(backend):
        optimizer.step()
    assert passes(driver) == {"optfactory_update": 3}


def test_no_more_blocks_than_are_resident_and_no_more_than_chunks() -> None:
    for shape, blocks in (((2048,), 1), ((2049,), 2), ((100_000,), 7)):
        backend, driver = emulator(blocks=7)
        optimizer = build("adam", [shape])
        give_gradients(optimizer, 0)
        with on(backend):
            optimizer.step()
        assert ("optfactory_update", blocks) in driver.launches


@pytest.mark.parametrize("count", [1, 600])
@pytest.mark.parametrize("name", NAMES)
def test_in_a_steady_state_only_scalars_are_written(name: str, count: int) -> None:
    backend, driver = emulator()
    optimizer = build(name, [(65,)] * count, min_8bit_size=1)
    give_gradients(optimizer, 0)
    with on(backend):
        optimizer.step()
        for step in range(1, 4):
            refill_gradients(optimizer, step)
            driver.launches.clear()
            optimizer.step()
            assert writes(driver) == 1


def test_what_moved_is_written_again() -> None:
    backend, driver = emulator()
    optimizer = build("adam", [(300,), (70, 64)])
    p, q = held(optimizer)
    with on(backend):
        for change, expected in (
            (lambda: give_gradients(optimizer, 0), 4),  # both pointers, the scalars and their rows
            (lambda: None, 1),
            (lambda: setattr(p, "grad", p.grad.clone()), 2),
            (lambda: setattr(p, "data", p.data.clone()), 2),
            (
                lambda: setattr(q, "grad", q.grad.t().contiguous().t()),
                5,
            ),  # a view, two columns
            (lambda: setattr(q, "grad", q.grad.contiguous()), 3),  # column g, no views, scalars
        ):
            kept = q.grad  # its memory is not given to the next gradient
            change()
            driver.launches.clear()
            optimizer.step()
            assert writes(driver) == expected
            del kept


def test_replaced_state_gets_new_tables() -> None:
    one, other = build("adam8bit", [(70, 64)]), build("adam8bit", [(70, 64)])
    with on(emulator()[0]):
        for step in range(3):
            give_gradients(one, step)
            give_gradients(other, step)
            one.step()
            other.step()
            p = held(one)[0]
            spoilt = one.state[p]
            one.state[p] = {key: tensor.clone() for key, tensor in spoilt.items()}
            for tensor in spoilt.values():
                tensor.fill_(77)
    assert_same(one, other)


# ---- results ---------------------------------------------------------------------------------


def trained(backend: Any, name: str, shapes: Sequence[Shape]) -> Optimizer2State:
    optimizer = build(name, shapes, lr=0.01)
    with on(backend):
        for step in range(3):
            give_gradients(optimizer, step)
            optimizer.step()
    return optimizer


@pytest.mark.parametrize("name", NAMES)
def test_results_depend_on_no_grid_and_no_order(name: str) -> None:
    first, *others = (
        trained(emulator(seed, blocks)[0], name, MIXED)
        for seed, blocks in ((0, 1), (1, 1), (2, 3), (3, 7), (4, 100))
    )
    for other in others:
        assert_same(first, other)


def ratios(optimizer: Optimizer2State) -> list[float]:
    """The trust ratios of the last step, by parameter."""
    found: dict[int, float] = {}
    for bucket in optimizer._current_plan().gather():
        for slot, ratio in zip(bucket.slots, bucket.tables.static.ratios.tolist(), strict=True):
            found[id(slot.parameter)] = ratio
    return [found[id(p)] for p in held(optimizer)]


@pytest.mark.parametrize("name", ["lamb32bit", "lamb8bit"])
def test_norms_depend_on_no_grid(name: str) -> None:
    results = [ratios(trained(emulator(b, b)[0], name, MIXED)) for b in (1, 3, 7)]
    assert results[0] == results[1] == results[2]
    assert len(set(results[0])) == len(MIXED)


@pytest.mark.parametrize("name", NAMES)
def test_results_depend_on_nothing_else_in_the_bucket(name: str) -> None:
    shapes = [shape for shape in MIXED if shape != (1,)]
    together = held(trained(emulator()[0], name, shapes))
    for index, shape in enumerate(shapes):
        p = values(shape, torch.float32, index).requires_grad_()
        others: list[Tensor] = [torch.zeros(64, 65).requires_grad_() for _ in range(index)]
        optimizer = build_optimizer(name, [*others, p], lr=0.01)
        with on(emulator()[0]):
            for step in range(3):
                give_gradients(optimizer, step)  # p's are the same, as its place is
                optimizer.step()
        assert is_same(p, together[index]), shape


@pytest.mark.parametrize("name", NAMES)
def test_chunks_of_many_rounds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large tensors have longer chunks; here tensors are large from 4096 elements on."""
    short = trained(emulator()[0], name, MIXED)
    monkeypatch.setattr(cuda_tables, "_ELEMENTS_PER_ROUND", 4096)
    first, second = (trained(emulator(b, b)[0], name, MIXED) for b in (1, 3))
    assert_same(first, second)
    if name.startswith("adam"):
        assert_same(first, short)
    else:  # sums of other chunks
        assert ratios(first) == pytest.approx(ratios(short), rel=2**-22)
