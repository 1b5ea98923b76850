"""Parameters, gradients and groups that change under the optimizer's feet."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from optfactory import build_optimizer
from optfactory.errors import ConfigError
from tests.torch_api.harness import (
    bits,
    held,
    snapshot,
    train,
    weight,
)


@pytest.mark.parametrize("name", ["adam", "lamb8bit"])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda p: p.double(), r"float64"),
        (lambda p: p[:-1].clone(), r"(elements|shape)"),
        (lambda p: torch.cat([p, p]), r"(elements|shape)"),
        (lambda p: p.t().contiguous(), r"shape"),
    ],
    ids=["cast", "shrunk", "grown", "reshaped"],
)
def test_a_parameter_that_no_longer_fits_is_named(
    change: Callable[[Tensor], Tensor], reason: str, name: str, backend: str
) -> None:
    p, other = weight(70, 80), weight()
    optimizer = build_optimizer(name, [("other", other), ("body.weight", p)])
    train(optimizer, range(1))
    p.grad = None
    p.data = change(p.detach())
    p.grad = torch.ones_like(p)
    other.grad = torch.ones_like(other)
    before = bits(other)
    with pytest.raises(ConfigError, match=rf"body\.weight.*{reason}"):
        optimizer.step()
    assert bits(other) == before
    assert optimizer.state[other]["step"] == 1


def test_a_gradient_of_another_size_is_refused(backend: str) -> None:
    p = weight(300)
    optimizer = build_optimizer("adam", [("w", p)])
    train(optimizer, range(1))
    whole = p.data
    p.grad = None
    p.data = whole[:150]
    p.grad = torch.ones(150)
    p.data = whole  # torch checks a gradient's size only when it is assigned
    before = bits(p)
    with pytest.raises(ConfigError, match=r"\bw: "):
        optimizer.step()
    assert bits(p) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_parameter_may_be_cast_between_supported_dtypes(dtype: torch.dtype, backend: str) -> None:
    p = weight(70, 80)
    optimizer = build_optimizer("adam", [p], lr=0.1)
    p.grad = torch.ones_like(p)
    optimizer.step()
    p.grad = None
    p.data = p.detach().to(dtype)
    before = p.detach().clone()
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert p.dtype == dtype
    assert p.isfinite().all()
    assert (p < before).all()
    assert optimizer.state[p]["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("name", ["adam", "lamb8bit"])
def test_a_parameter_moved_to_another_device_is_named(name: str, backend: str) -> None:
    p, other = weight(70, 80), weight()
    optimizer = build_optimizer(name, [("other", other), ("body.weight", p)])
    train(optimizer, range(1))
    # As Module.to does where it swaps tensors; p.data cannot change its device.
    p.grad = None
    torch.utils.swap_tensors(p, torch.ones(70, 80, device="meta").requires_grad_())
    p.grad = torch.ones(70, 80, device="meta")
    before = bits(other)
    with pytest.raises(ConfigError, match=r"body\.weight.*meta"):
        optimizer.step()
    assert bits(other) == before


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="this torch ties their dtypes")
def test_a_gradient_of_another_dtype_is_refused_unless_float32(backend: str) -> None:
    p = torch.ones(300, dtype=torch.bfloat16).requires_grad_()
    p.grad_dtype = None
    optimizer = build_optimizer("adam", [("w", p)], lr=0.1)
    p.grad = torch.ones(300)
    optimizer.step()
    assert (p < 1).all()
    before = snapshot(optimizer)
    for dtype in (torch.float16, torch.float64):
        p.grad = torch.ones(300, dtype=dtype)
        with pytest.raises(ConfigError, match=rf"\bw: .*{dtype}"):
            optimizer.step()
        assert snapshot(optimizer) == before


def test_a_group_emptied_or_regrouped_by_hand_is_followed(backend: str) -> None:
    p, q = weight(), weight()
    optimizer = build_optimizer("adam", [p, q])
    train(optimizer, range(1))
    optimizer.param_groups[0]["params"] = [q]
    before = bits(p)
    train(optimizer, range(1, 2))
    assert bits(p) == before
    assert optimizer.state[q]["step"] == 2


def test_hyperparameters_changed_by_hand_act(backend: str) -> None:
    p = weight(value=0.0)
    optimizer = build_optimizer("adam", [p], lr=0.1)
    train(optimizer, range(1))
    group = optimizer.param_groups[0]
    for key, value in (("eps", 10.0), ("betas", (0.5, 0.5)), ("weight_decay", 0.5)):
        twin = copy.deepcopy(optimizer)
        group[key] = value
        train(twin, range(1, 2))
        train(optimizer, range(1, 2))
        assert bits(held(twin)[0]) != bits(p), key
