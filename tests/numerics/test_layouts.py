"""Memory layouts: strided, offset, expanded, empty and 0-d tensors give the contiguous result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optfactory import build_optimizer
from tests.devices import randn
from tests.numerics.harness import DTYPES, Twin, bits, gradient

NAMES = ["adam32bit", "adam8bit", "lamb32bit", "paged_lamb8bit"]
SHAPE = (64, 130)
CONV = (32, 16, 5, 3)
GUARD = 7.5
STEPS = 3

View = Callable[[Tensor], tuple[Tensor, Tensor]]


def _transposed(x: Tensor) -> tuple[Tensor, Tensor]:
    storage = x.transpose(0, 1).contiguous()
    return storage, storage.transpose(0, 1)


def _reversed_dimensions(x: Tensor) -> tuple[Tensor, Tensor]:
    order = tuple(reversed(range(x.ndim)))
    storage = x.permute(order).contiguous()
    return storage, storage.permute(order)


def _columns_of_a_larger_matrix(x: Tensor) -> tuple[Tensor, Tensor]:
    storage = torch.full((x.shape[0] + 2, *x.shape[1:-1], x.shape[-1] + 5), GUARD, dtype=x.dtype)
    view = storage[1:-1, ..., 2 : 2 + x.shape[-1]]
    view.copy_(x)
    return storage, view


def _every_other_row(x: Tensor) -> tuple[Tensor, Tensor]:
    storage = torch.full((2 * x.shape[0], *x.shape[1:]), GUARD, dtype=x.dtype)
    storage[::2].copy_(x)
    return storage, storage[::2]


def _every_third_element(x: Tensor) -> tuple[Tensor, Tensor]:
    storage = torch.full((*x.shape, 3), GUARD, dtype=x.dtype)
    storage[..., 1].copy_(x)
    return storage, storage[..., 1]


def _odd_offset(x: Tensor) -> tuple[Tensor, Tensor]:
    storage = torch.full((x.numel() + 4,), GUARD, dtype=x.dtype)
    view = storage[1 : 1 + x.numel()].view(x.shape)
    view.copy_(x)
    return storage, view


def _channels_last(x: Tensor) -> tuple[Tensor, Tensor]:
    storage = x.to(memory_format=torch.channels_last)
    return storage, storage


VIEWS: dict[str, tuple[View, tuple[int, ...]]] = {
    "transposed": (_transposed, SHAPE),
    "columns": (_columns_of_a_larger_matrix, SHAPE),
    "every_other_row": (_every_other_row, SHAPE),
    "every_third_element": (_every_third_element, SHAPE),
    "every_third_element_1d": (_every_third_element, (4099,)),
    "odd_offset": (_odd_offset, SHAPE),
    "channels_last": (_channels_last, CONV),
    "conv_reversed": (_reversed_dimensions, CONV),
    "conv_columns": (_columns_of_a_larger_matrix, CONV),
}


def _values(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return (0.1 * randn(shape, generator)).to(dtype)


def _run(name: str, p: Tensor, grads: list[Tensor], **asked: Any) -> tuple[Any, dict[str, Tensor]]:
    optimizer = build_optimizer(name, [p], **asked)
    for g in grads:
        p.grad = g
        optimizer.step()
    return bits(p), dict(optimizer.state[p])


def _assert_same(got: tuple[Any, dict[str, Tensor]], want: tuple[Any, dict[str, Tensor]]) -> None:
    assert (got[0] == want[0]).all()
    assert set(got[1]) == set(want[1])
    for key, tensor in want[1].items():
        assert (bits(got[1][key]) == bits(tensor)).all(), key


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", VIEWS)
@pytest.mark.parametrize("name", NAMES)
def test_strided_parameters(name: str, layout: str, dtype: str, backend: str) -> None:
    make, shape = VIEWS[layout]
    values = _values(shape, DTYPES[dtype])
    grads = [gradient(shape, DTYPES[dtype], step) for step in range(STEPS)]
    want = _run(name, values.clone().requires_grad_(), grads)

    storage, view = make(values)
    p = nn.Parameter(view)
    address, strides, outside = p.data_ptr(), p.stride(), storage.clone()
    strided_grads = [make(g)[1] for g in grads]
    got = _run(name, p, strided_grads)

    _assert_same(got, want)
    assert p.data_ptr() == address == view.data_ptr()
    assert p.stride() == strides
    assert torch.equal(view, p)
    guards = outside == GUARD
    assert torch.equal(storage[guards], outside[guards])


@pytest.mark.parametrize("name", ["adam32bit", "adam8bit", "lamb8bit"])
@pytest.mark.parametrize("layout", ["transposed", "every_other_row", "odd_offset"])
def test_parameter_and_gradient_of_different_layout(name: str, layout: str, backend: str) -> None:
    make = VIEWS[layout][0]
    values = _values(SHAPE, torch.float32)
    grads = [gradient(SHAPE, torch.float32, step) for step in range(STEPS)]
    want = _run(name, values.clone().requires_grad_(), grads)
    strided_grads = [make(g)[1] for g in grads]
    kept = [g.clone() for g in strided_grads]
    _assert_same(_run(name, values.clone().requires_grad_(), strided_grads), want)
    _assert_same(_run(name, nn.Parameter(make(values)[1]), grads), want)
    for g, before in zip(strided_grads, kept, strict=True):
        assert torch.equal(g, before)


@pytest.mark.parametrize("name", ["adam32bit", "adam8bit", "lamb32bit", "lamb8bit"])
@pytest.mark.parametrize("expanded", ["scalar", "row", "column"])
def test_expanded_gradients(name: str, expanded: str, backend: str) -> None:
    sizes = {"scalar": (1, 1), "row": (1, SHAPE[1]), "column": (SHAPE[0], 1)}[expanded]
    grads = [gradient(sizes, torch.float32, 20 + i).expand(SHAPE) for i in range(STEPS)]
    assert 0 in grads[0].stride()
    values = _values(SHAPE, torch.float32)
    want = _run(name, values.clone().requires_grad_(), [g.contiguous() for g in grads])
    _assert_same(_run(name, values.clone().requires_grad_(), grads), want)


def test_views_that_share_a_storage_are_updated_side_by_side(backend: str) -> None:
    """Two parameters cut from one flat buffer, as flattening wrappers do."""
    flat = _values((SHAPE[0] * SHAPE[1] + 4101,), torch.float32)
    parts = [flat[:8320].view(SHAPE), flat[8320:]]
    alone = [part.clone().requires_grad_() for part in parts]
    shared = [nn.Parameter(part) for part in parts]
    for side in (alone, shared):
        optimizer = build_optimizer("adam8bit", side)
        for step in range(STEPS):
            for i, p in enumerate(side):
                p.grad = gradient(tuple(p.shape), p.dtype, 10 * step + i)
            optimizer.step()
    assert torch.equal(flat, torch.cat([p.detach().reshape(-1) for p in alone]))


def test_a_parameter_that_overlaps_itself_is_refused(backend: str) -> None:
    """As torch refuses to write in place where two elements are one number in memory."""
    p = nn.Parameter(torch.zeros(1, 130).expand(64, 130))
    with pytest.raises((ValueError, RuntimeError)):
        _run("adam32bit", p, [torch.ones(64, 130)])


@pytest.mark.parametrize("name", NAMES)
def test_empty_and_0d_parameters(name: str, backend: str) -> None:
    shapes: list[tuple[int, ...]] = [(0,), (0, 5), (5, 0), (), (3, 4)]
    twin = Twin(name, [_values(shape, torch.float32).requires_grad_() for shape in shapes])
    for step in range(STEPS):
        twin.step(step)


@pytest.mark.parametrize("name", NAMES)
def test_only_empty_parameters(name: str, backend: str) -> None:
    twin = Twin(name, [torch.zeros(0, requires_grad=True), torch.zeros(4, 0, requires_grad=True)])
    twin.step(0)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_without_gradient_stay(name: str, backend: str) -> None:
    frozen, trained = (_values(SHAPE, torch.float32).requires_grad_() for _ in range(2))
    before = frozen.detach().clone()
    optimizer = build_optimizer(name, [frozen, trained])
    optimizer.step()
    assert torch.equal(trained, before)
    for step in range(STEPS):
        trained.grad = gradient(SHAPE, torch.float32, step)
        optimizer.step()
    assert torch.equal(frozen, before)
    assert not torch.equal(trained, before)
    assert float(optimizer.state[trained]["step"]) == STEPS
    assert float(optimizer.state.get(frozen, {}).get("step", 0.0)) == 0.0
    frozen.grad = gradient(SHAPE, torch.float32, 0)
    optimizer.step()
    assert float(optimizer.state[frozen]["step"]) == 1.0
    assert float(optimizer.state[trained]["step"]) == STEPS + 1


@pytest.mark.parametrize("name", ["adam32bit", "lamb8bit"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_fp32_gradients_of_16_bit_parameters(name: str, dtype: str, backend: str) -> None:
    params = [_values(shape, DTYPES[dtype]).requires_grad_() for shape in (SHAPE, (7,))]
    grads = [gradient(tuple(p.shape), torch.float32, i) for i, p in enumerate(params)]
    twin = Twin(name, params)
    try:
        for p, g in zip(params, grads, strict=True):
            if hasattr(p, "grad_dtype"):
                p.grad_dtype = torch.float32
            p.grad = g
    except RuntimeError as refusal:
        pytest.skip(f"this torch refuses: {refusal}")
    for _ in range(STEPS):
        twin.step(0, grads)
