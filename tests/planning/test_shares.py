"""Parameters, buffers and gradients of a plan are what torch has of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optfactory import plan
from optfactory.planning.memory_plan import MemoryPlan
from tests.planning.harness import DTYPES, Odd, Tied, on_meta, sized, storage_bytes


def by_bits(tensors: list[Tensor]) -> dict[int, int]:
    """What torch keeps for tensors, by bits of an element."""
    kinds = {tensor.itemsize for tensor in tensors}
    found = {8 * k: storage_bytes(t for t in tensors if t.itemsize == k) for k in kinds}
    return {bits: nbytes for bits, nbytes in found.items() if nbytes}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("build", [Odd, Tied])
def test_parameters_and_buffers_are_counted_once(
    build: Callable[[], nn.Module], dtype: torch.dtype
) -> None:
    model = build().to(dtype)
    planned = plan("adamw8bit", on_meta(build, dtype))
    assert sized(planned, "parameters") == by_bits(list(model.parameters()))
    assert sized(planned, "buffers") == by_bits(list(model.buffers()))
    assert set(sized(planned, "parameters")) == {8 * dtype.itemsize}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_what_backward_allocates(dtype: torch.dtype) -> None:
    model = Tied().to(dtype)
    planned = plan("adamw", on_meta(Tied, dtype))
    model(torch.arange(50)).float().square().sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(grads) == 3  # the tied weight, and the norm's two
    assert sized(planned, "gradients") == by_bits(grads)


def test_parameters_of_several_dtypes_have_a_share_each() -> None:
    def model() -> nn.Module:
        tied = Tied()
        tied.norm.to(torch.bfloat16)
        tied.embed.to(torch.float16)
        return tied

    with torch.device("meta"):
        planned = plan("adam", model())
    real = list(model().parameters())
    assert sized(planned, "parameters") == by_bits(real)
    assert sized(planned, "gradients") == by_bits([p for p in real if p.requires_grad])
    assert set(sized(planned, "parameters")) == {16, 32}
    assert set(sized(planned, "gradients")) == {16}


def test_freezing_takes_gradients_and_state_and_leaves_parameters() -> None:
    whole, part = on_meta(Odd), on_meta(Odd)
    part.wide.requires_grad_(False)
    before, after = plan("adam8bit", whole), plan("adam8bit", part)
    size = 4 * (513 * 400 + 400)
    assert sized(after, "parameters") == sized(before, "parameters")
    assert sized(before, "gradients")[32] - sized(after, "gradients")[32] == size
    rows = {row.name: row.nbytes for row in before.report.rows}
    gone = rows["wide.weight"] + rows["wide.bias"]
    assert before.state_bytes - after.state_bytes == gone


def test_tensors_that_are_no_module_count_alone() -> None:
    model = on_meta(Tied)
    planned = plan("adam8bit", [model.embed.weight])
    assert sized(planned, "parameters") == sized(planned, "gradients") == {32: 4 * 50 * 96}
    assert sized(planned, "buffers") == {}


def assert_adds_up(planned: MemoryPlan) -> None:
    keys = [(s.what, s.device, s.bits, s.place) for s in planned.shares]
    assert len(keys) == len(set(keys))
    assert all(share.nbytes > 0 for share in planned.shares)
    assert list(dict.fromkeys(share.what for share in planned.shares)) == [
        what
        for what in ("parameters", "buffers", "gradients", "state")
        if any(share.what == what for share in planned.shares)
    ]
    totals = Counter[str]()
    for share in planned.shares:
        totals[share.what] += share.nbytes
    assert totals["state"] == planned.state_bytes == planned.report.state_bytes
    assert totals["state"] == sum(row.nbytes for row in planned.report.rows)
    stay, leave = planned.needed()
    device = planned.shares[0].device
    assert stay + leave == sum(s.nbytes for s in planned.shares if s.device == device)
    assert leave == sum(s.nbytes for s in planned.shares if s.place != "resident")
    dictionary = planned.as_dict()
    assert dictionary["state_bytes"] == totals["state"]
    assert [share["nbytes"] for share in dictionary["shares"]] == [
        share.nbytes for share in planned.shares
    ]
    assert (dictionary["bytes_that_stay"], dictionary["bytes_that_can_leave"]) == (stay, leave)
    assert json.loads(json.dumps(dictionary, allow_nan=False)) is not None


@pytest.mark.parametrize("device", [None, "cpu", "cuda"])
@pytest.mark.parametrize("name", ["adam", "adam8bit", "paged_lamb", "paged_adamw8bit"])
@pytest.mark.parametrize("build", [Odd, Tied])
def test_shares_add_up(build: Callable[[], nn.Module], name: str, device: str | None) -> None:
    rules: dict[str, Any] = {"w": {"match": "*weight", "is_paged": True, "optional": True}}
    for overrides in ({}, {"param_groups": rules}):
        assert_adds_up(plan(name, on_meta(build), device=device, **overrides))
