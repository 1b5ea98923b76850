"""More than 2^31 elements in one tensor: no index is 32 bits wide."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from optfactory import build_optimizer
from tests.gpu.harness import DEVICE, needs_gpu, numbers
from tests.numerics.harness import gradient

pytestmark = [*needs_gpu, pytest.mark.slow]

NEEDED = 24 * 2**30
EDGE = 1000  # elements at either end that are compared; the rest have one value


def _ends(tensor: Tensor, values: list[Tensor]) -> None:
    flat = tensor.view(-1)
    flat[:EDGE], flat[-EDGE:] = values[0].to(DEVICE), values[1].to(DEVICE)


# The last blocks of the flat tensor are cut as a tensor of EDGE elements is; in rows they are not,
# hence a row that ends with as many whole blocks and as short a last one.
@pytest.mark.parametrize("shape", [(2**31 + EDGE,), (2, 2**30 + EDGE)], ids=["flat", "rows"])
@pytest.mark.parametrize("name", ["adamw8bit", "lamb8bit"])
def test_the_last_elements_are_updated_as_those_of_a_small_tensor(
    name: str, shape: tuple[int, ...]
) -> None:
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info(DEVICE)[0] < NEEDED:
        pytest.skip(f"needs {NEEDED / 2**30:.0f} GiB of free device memory")
    values = [numbers((EDGE,), torch.bfloat16, seed) for seed in (0, 1)]
    grads = [gradient((EDGE,), torch.bfloat16, seed) for seed in (2, 3)]
    # LAMB's ratio of a huge tensor is not that of a small one, but in `clip` mode both are 1.
    options = {"trust_ratio": "clip", "max_unorm": 0.0} if name == "lamb8bit" else {}

    p = torch.full(shape, 0.5, dtype=torch.bfloat16, device=DEVICE)
    p.grad = torch.full_like(p, 0.25)
    _ends(p, values)
    _ends(p.grad, grads)
    optimizer = build_optimizer(name, [p.requires_grad_()], lr=0.1, **options)
    small = [value.to(DEVICE).requires_grad_() for value in values]
    reference = build_optimizer(name, small, lr=0.1, min_8bit_size=1, **options)
    for value, grad in zip(small, grads, strict=True):
        value.grad = grad.to(DEVICE)
    for _ in range(2):
        optimizer.step()
        reference.step()

    flat = p.detach().view(-1)
    whole = EDGE // 256 * 256  # the last block of the small tensor is whole in the large one
    assert torch.equal(flat[:whole], small[0].detach()[:whole])
    assert torch.equal(flat[-EDGE:], small[1].detach())
    state, last = optimizer.state[p], reference.state[small[1]]
    for key in ("exp_avg_q8", "exp_avg_sq_q8"):
        assert torch.equal(state[key].view(-1)[-EDGE:], last[key])
    for key in ("exp_avg_absmax", "exp_avg_sq_absmax"):
        scales = math.ceil(EDGE / 256)
        assert torch.equal(state[key].view(-1)[-scales:], last[key].view(-1))
    # All the others moved alike: by two steps of about the learning rate.
    middle = flat[-(-EDGE // 256) * 256 : -EDGE]
    assert float(middle[0]) == pytest.approx(0.3, abs=0.01)
    assert torch.equal(middle.min(), middle.max())
