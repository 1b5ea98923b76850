"""cautious and cautious_weight_decay: against the papers' own lines, and where they are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from optfactory import build_optimizer
from tests.families import CAUTIOUS, ELEMENT_WISE, acts_on, beside
from tests.numerics.harness import Twin, parameters
from tests.options.tools import (
    SMALL,
    assert_refused,
    assert_resumes,
    assert_threads_do_not_matter,
    trained,
    widths,
)

fields = pytest.mark.parametrize("field", CAUTIOUS)
# Families whose steps have the sign of the gradient, and those whose decay is never apart.
IDLE = {"cautious": {"adagrad"}, "cautious_weight_decay": {"adagrad", "lars", "rmsprop", "sgd"}}


def papers_adamw(p: Tensor, grads: list[Tensor], lr: float, decay: float, masks: Any) -> Tensor:
    """C-AdamW (Liang et al. 2024, Alg. 1 and 2) with CWD (Chen et al. 2025, Alg. 1), in float64."""
    steps, decays = masks
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for t, g in enumerate(grads, 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        u = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        if steps:
            phi = (u * g > 0).double()
            u = phi * u * p.numel() / (phi.sum() + 1)
        kept = (u * p >= 0).double() if decays else torch.ones_like(p)
        p = p - lr * (u + decay * kept * p)
    return p


@pytest.mark.parametrize("masks", [(True, False), (False, True), (True, True)], ids=str)
def test_adamw_is_the_papers(masks: tuple[bool, bool], backend: str) -> None:
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(40, 100, generator=generator)
    grads = [0.3 + torch.randn(start.shape, generator=generator) for _ in range(8)]
    asked: dict[str, Any] = dict(zip(CAUTIOUS, masks, strict=True))
    p = start.to(torch.get_default_device(), copy=True).requires_grad_()
    optimizer = build_optimizer("adamw", [p], lr=0.02, weight_decay=0.1, **asked)
    for g in grads:
        p.grad = g.to(p.device)
        optimizer.step()
    doubles = [g.double() for g in grads]
    want = papers_adamw(start.double(), doubles, 0.02, 0.1, masks)
    plain = papers_adamw(start.double(), doubles, 0.02, 0.1, (False, False))
    torch.testing.assert_close(p.detach().double().cpu(), want, rtol=0, atol=5e-6)
    assert float((want - plain).abs().max()) > 1e-3


@fields
@pytest.mark.parametrize("family", ELEMENT_WISE)
def test_refused_where_there_is_nothing_to_leave_out(family: str, field: str) -> None:
    assert acts_on(family, field) == (family not in IDLE[field])
    if family in IDLE[field]:
        assert_refused(f"{field}: .*drop it", family, **{field: True})
    assert_refused(
        "compat", family, compat="bitsandbytes", **{field: True}, **(beside(family, field) or {})
    )


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("sgd", {"momentum": 0.0, "cautious": True}),
        ("rmsprop", {"cautious": True}),
        ("lars", {"cautious": True}),
        ("adam", {"cautious_weight_decay": True}),
        ("adamw", {"cautious_weight_decay": True, "adam_w_mode": False}),
        ("lamb", {"cautious_weight_decay": True}),
        ("nadam", {"cautious_weight_decay": True}),
    ],
    ids=str,
)
def test_refused_beside_other_fields(name: str, asked: dict[str, Any]) -> None:
    field = next(key for key in asked if key in CAUTIOUS)
    assert_refused(rf"optimizer\.{field}: ", name, **asked)
    rule = {"head": {"match": "*", **asked}}
    assert_refused(rf"param_groups\.head\.{field}: ", name, param_groups=rule)


@widths
def test_elements_that_stay_are_no_agreeing_ones(width: int, backend: str) -> None:
    """Half of the elements have no gradient: the others' steps are twice as long as without."""
    p = torch.ones(80, 100, requires_grad=True)
    asked: dict[str, Any] = {"cautious": True, "skip_zeros": True, "optim_bits": width}
    twin = Twin("adam", [p], lr=0.25, **asked)
    g = torch.ones(80, 100)
    g[::2] = 0.0
    twin.step(0, [g])
    assert (p[::2] == 1).all()
    torch.testing.assert_close(p[1::2].detach(), torch.full((40, 100), 1 - 0.25 * 8000 / 4001))


def test_no_element_agrees(backend: str) -> None:
    """The step is 0, and the next one is not lost."""
    p = torch.ones(500, requires_grad=True)
    optimizer = build_optimizer("sgd", [p], lr=0.1, momentum=0.9, cautious=True)
    for g, want in ((1.0, 1 - 0.1 * 500 / 501), (-0.1, 1 - 0.1 * 500 / 501)):
        p.grad = torch.full_like(p, g)
        optimizer.step()
        torch.testing.assert_close(p.detach(), torch.full_like(p, want))


def test_signs_are_compared_where_products_underflow(backend: str) -> None:
    p = torch.ones(500, requires_grad=True)
    optimizer = build_optimizer("sgd", [p], lr=1e30, momentum=0.9, cautious=True)
    p.grad = torch.full_like(p, 1e-30)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full_like(p, 1 - 500 / 501), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["lamb", "lamb8bit", "lars"])
def test_ratios_are_of_the_masked_direction(name: str, backend: str) -> None:
    asked = {"trust_ratio": "clip", "max_unorm": 0.01} if name == "lars" else {}
    twin = Twin(name, parameters(torch.float32, SMALL), cautious=True, lr=0.1, **asked)
    for step in range(4):
        assert all(update.ratio != 1 for update in twin.step(step))


@fields
@widths
def test_resumes_bit_for_bit(width: int, field: str, backend: str) -> None:
    asked = {field: True, "optim_bits": width}
    on = assert_resumes("adamw", weight_decay=0.1, **asked)
    assert on != trained("adamw", weight_decay=0.1, optim_bits=width, steps=6)


def test_threads_do_not_matter(backend: str) -> None:
    shapes = [(150_001,), (70, 64), (3,)]
    assert_threads_do_not_matter("lion8bit", shapes, cautious=True, cautious_weight_decay=True)
