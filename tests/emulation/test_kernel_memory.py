"""Which memory kernels touch: views of larger tensors, no elements at all, inaccessible pages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from optfactory import build_optimizer
from tests.emulation.driver import EmulatedDriver, EmulationError
from tests.emulation.fenced import fenced
from tests.emulation.harness import (
    PAIRS,
    Shape,
    assert_same,
    emulator,
    give_gradients,
    on,
    values,
)
from tests.emulation.views import Fences, Views
from tests.numerics.harness import gradient
from tests.unit.harness import needs_compiler

pytestmark = needs_compiler

NAMES = ["adam32bit", "adam8bit", "lamb32bit", "lamb8bit"]
STEPS = 2


@pytest.mark.parametrize("pair", ["fp32", "bf16", "fp16-fp32"])
@pytest.mark.parametrize("name", NAMES)
def test_views_give_what_contiguous_tensors_give(name: str, pair: str) -> None:
    views = Views(name, PAIRS[pair])
    strides = [p.stride() for p in views.params]
    backend = emulator()[0]
    for step in range(STEPS):
        views.new_gradients(step)
        views.step(backend)
    assert [p.stride() for p in views.params] == strides


def test_views_that_become_contiguous_are_read_as_such() -> None:
    """What a table says of a view must go with the view."""
    p, q = (values((64, 130), torch.float32, 0).requires_grad_() for _ in range(2))
    one, other = build_optimizer("adam8bit", [p]), build_optimizer("adam8bit", [q])
    for step in range(4):
        grad = gradient((64, 130), torch.float32, step)
        q.grad = grad
        p.grad = grad.t().contiguous().t() if step % 2 == 0 else grad
        with on(emulator()[0]):
            one.step()
            other.step()
        assert_same(one, other)


@pytest.mark.parametrize("name", NAMES)
def test_tensors_without_elements(name: str) -> None:
    shapes: list[Shape] = [(0,), (300,), (0, 5), (64, 70), (5, 0), ()]
    params = [values(shape, torch.float32, i).requires_grad_() for i, shape in enumerate(shapes)]
    alone = [p.detach().clone().requires_grad_() for p in params if p.numel()]
    optimizer, other = build_optimizer(name, params), build_optimizer(name, alone)
    filled = [p for p in params if p.numel()]
    for step in range(STEPS):
        give_gradients(optimizer, step)
        for p, q in zip(filled, alone, strict=True):
            q.grad = p.grad
        with on(emulator()[0]):
            optimizer.step()
            other.step()
    assert all(torch.equal(p, q) for p, q in zip(filled, alone, strict=True))
    assert all(state["step"] == STEPS for state in optimizer.state.values())


@pytest.mark.parametrize("name", NAMES)
def test_nothing_but_tensors_without_elements(name: str) -> None:
    backend, driver = emulator()
    params = [torch.zeros(0, requires_grad=True), torch.zeros(4, 0, requires_grad=True)]
    optimizer = build_optimizer(name, params)
    give_gradients(optimizer, 0)
    with on(backend):
        optimizer.step()
    kernels = {kernel for kernel, _ in driver.launches}
    assert not kernels & {"optfactory_update", "optfactory_statistics"}
    assert all(state["step"] == 1 for state in optimizer.state.values())


@pytest.mark.parametrize("side", ["before", "behind"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["adam32bit", "lamb8bit"])
def test_nothing_is_read_outside_of_tensors(name: str, dtype: torch.dtype, side: str) -> None:
    fences = Fences(name, dtype, side)
    backend = emulator()[0]
    for step in range(STEPS):
        fences.step(backend, step)


@pytest.mark.parametrize("side", ["before", "behind"])
def test_fences_stop_a_kernel(side: str) -> None:
    source = 'extern "C" __global__ void first_of(const float* x, float* y) { *y = *x; }'
    x, y = fenced(torch.ones(5), side), torch.zeros(1)
    module = EmulatedDriver().module(source, "first_of", 1, torch.device("cpu"))
    first, outside = (0, -1) if side == "before" else (4, 5)
    module.launch("first_of", 1, [address_of(x, first), address_of(y, 0)])
    assert y.item() == 1.0
    with pytest.raises(EmulationError, match="invalid access"):
        module.launch("first_of", 1, [address_of(x, outside), address_of(y, 0)])


def address_of(tensor: Tensor, element: int) -> Any:
    return torch.tensor(tensor.data_ptr() + 4 * element).numpy()
