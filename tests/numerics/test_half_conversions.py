"""16-bit parameters are read and stored by instructions where there are some: all patterns."""

from __future__ import annotations

import pytest
import torch

from optfactory import build_optimizer
from tests.conftest import on_cpus

DTYPES = [torch.float16, torch.bfloat16]


def all_patterns(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


@on_cpus
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_comes_back_as_it_was(backend: str, dtype: torch.dtype) -> None:
    """A step of size 0 reads and stores it; a NaN stays one."""
    numbers = all_patterns(dtype)
    p = numbers.clone().requires_grad_()
    p.grad = torch.ones_like(p)
    build_optimizer("adamw", [p], lr=0.0).step()
    after = p.detach()
    assert torch.equal(after.isnan(), numbers.isnan())
    kept = ~numbers.isnan()
    assert torch.equal(after.view(torch.int16)[kept], numbers.view(torch.int16)[kept])


@on_cpus
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", [65536, 8 * 999 + 5])
def test_stored_numbers_are_the_nearest(backend: str, dtype: torch.dtype, numel: int) -> None:
    """By torch's own rounding of the float32 step, ties, subnormals and overflows among them."""
    numbers = all_patterns(dtype)[:numel]
    finite = torch.where(numbers.isfinite(), numbers, 0)
    p, exact = finite.clone().requires_grad_(), finite.float().requires_grad_()
    for each, name in ((p, "adamw32bit"), (exact, "adamw32bit")):
        # The first step has the size of the learning rate: half a unit of some of the numbers.
        each.grad = torch.ones_like(each)
        build_optimizer(name, [each], lr=2.0**-12, weight_decay=2.0**-4, eps=0.0).step()
    assert torch.equal(p.detach(), exact.detach().to(dtype))
