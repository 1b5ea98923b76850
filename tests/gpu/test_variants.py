"""Every kind of kernel, small: what compute-sanitizer runs, see examples/results/README.md."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from optfactory import build_optimizer
from tests.gpu.harness import DEVICE, busy, content, give, gradients, needs_gpu, parameters
from tests.numerics.harness import DTYPES, Twin, gradient

pytestmark = needs_gpu

SHAPES: list[tuple[int, ...]] = [(5,), (257,), (4097,), (33, 300), (70, 64)]
STEPS = 2

KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "adam-32": ("adam", "fp32", {}),
    "adam-32-bf16": ("adam", "bf16", {}),
    "adam-32-fp16": ("adam", "fp16", {"weight_decay": 0.1}),
    "amsgrad": ("adamw", "fp32", {"amsgrad": True}),
    "adam-8": ("adam8bit", "fp32", {}),
    "adam-8-bf16": ("adamw8bit", "bf16", {}),
    "adam-8-fp16": ("adamw8bit", "fp16", {}),
    "block-64": ("adamw8bit", "fp32", {"block_size": 64, "min_8bit_size": 1}),
    "block-512": ("adamw8bit", "bf16", {"block_size": 512, "min_8bit_size": 1}),
    "block-4096": ("adamw8bit", "fp32", {"block_size": 4096, "min_8bit_size": 1}),
    "lamb-32": ("lamb", "fp32", {}),
    "lamb-32-bf16": ("lamb", "bf16", {}),
    "lamb-8": ("lamb8bit", "fp32", {}),
    "lamb-8-bf16": ("lamb8bit", "bf16", {}),
    "lamb-clip": ("lamb", "fp32", {"trust_ratio": "clip", "adam_w_mode": False}),
    "lamb-8-clip": ("lamb8bit", "fp32", {"trust_ratio": "clip", "max_unorm": 0.02}),
    "managed": ("paged_adamw8bit", "fp32", {"page_memory": "managed"}),
    "pinned": ("paged_adamw8bit", "bf16", {"page_memory": "pinned"}),
    "pinned-lamb": ("paged_lamb", "fp32", {"page_memory": "pinned"}),
    "capturable": ("adamw8bit", "fp32", {"capturable": True}),
    "capturable-lamb": ("lamb", "fp32", {"capturable": True}),
}


@pytest.mark.parametrize(("name", "dtype", "options"), KINDS.values(), ids=KINDS)
def test_a_kind_of_kernel_follows_the_reference(
    name: str, dtype: str, options: dict[str, Any], small_pages: None
) -> None:
    twin = Twin(name, parameters(DEVICE, SHAPES, DTYPES[dtype]), **options)
    for step in range(STEPS):
        twin.step(step)


def _views(values: list[Tensor]) -> list[Tensor]:
    """The same numbers at odd addresses, transposed, and in every other row."""
    odd, transposed, rows = values
    flat = odd.new_empty(odd.numel() + 1)[1:].view(odd.shape).copy_(odd)
    return [flat, transposed.t().contiguous().t(), rows.repeat_interleave(2, dim=0)[::2]]


@pytest.mark.parametrize("name", ["adam", "adamw8bit", "lamb8bit"])
def test_views_follow_the_reference(name: str) -> None:
    shapes = [(33, 300), (70, 64), (65, 70)]
    values = [p.detach() for p in parameters(DEVICE, shapes)]
    grads = [gradient(shape, torch.float32, i).to(DEVICE) for i, shape in enumerate(shapes)]
    twin = Twin(name, [view.requires_grad_() for view in _views(values)])
    for _ in range(STEPS):
        twin.step(0, _views(grads))


@pytest.mark.parametrize("name", ["adamw", "lamb8bit"])
def test_a_tensor_with_more_chunks_than_the_grid_has_blocks(name: str) -> None:
    twin = Twin(name, parameters(DEVICE, [(1_300_007,), (5,)]))
    twin.step(0)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("name", ["adamw8bit", "lamb"])
def test_a_scale_and_a_finding_handed_over(name: str, capturable: bool) -> None:
    params, others = parameters(DEVICE), parameters(DEVICE)
    optimizer = build_optimizer(name, params, capturable=capturable)
    plain = build_optimizer(name, others, capturable=capturable)
    for found_inf in (0.0, 1.0):
        grads = gradients(params, 0)
        give(params, [grad * 4 for grad in grads])
        optimizer.grad_scale = torch.tensor(4.0, device=DEVICE)  # type: ignore[attr-defined]
        optimizer.found_inf = torch.tensor(found_inf, device=DEVICE)  # type: ignore[attr-defined]
        optimizer.step()
        if not found_inf:
            give(others, grads)
            plain.step()
    assert content(optimizer) == content(plain)


def test_many_tensors_and_a_busy_stream() -> None:
    """More tensors than one table-writing launch takes."""
    params = [torch.full((65,), 0.5, device=DEVICE).requires_grad_() for _ in range(600)]
    optimizer = build_optimizer("lamb", params, lr=0.1)
    for _ in range(STEPS):
        busy(0.001)
        give(params, [torch.ones_like(p) for p in params])
        optimizer.step()
    first = params[0].detach()
    assert all(torch.equal(p.detach(), first) for p in params)
    assert float(first[0]) != 0.5
