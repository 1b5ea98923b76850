"""State and pointers that no checkpoint and no torch function makes, but users can."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch

from optfactory import build_optimizer
from optfactory.errors import ConfigError, StateError
from tests.families import known_to
from tests.numerics.harness import DTYPES
from tests.robustness.harness import (
    FAMILIES,
    OPTIONS,
    SANITIZED,
    Numbers,
    assert_same,
    everything,
    fence_states,
)


@pytest.mark.parametrize("step", [-5.0, -1.0, 2.0**24, 2.0**31, 2.0**32, 2.0**62, 3e38])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_step_leads_out_of_a_buffer(family: str, option: str, step: float) -> None:
    """Norms are noted at a place, and random bits follow, from the step."""
    dtype, asked = OPTIONS[option]
    p = torch.ones(300, dtype=dtype).requires_grad_()
    # Which would take a root of a number below 0 at such steps.
    uncorrected = known_to(family, {"bias_correction": False})
    optimizer = build_optimizer(family, [p], **uncorrected, **asked)
    optimizer.init_states()
    fences = fence_states(optimizer, margin=131)
    optimizer.state[p]["step"].fill_(step)
    p.grad = torch.ones_like(p)
    with suppress(StateError, ConfigError):
        optimizer.step()
    for what, cut in fences:
        cut.assert_untouched_around(what)


@pytest.mark.skipif(SANITIZED, reason="undefined behaviour, though processors define it")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [8, 32])
@pytest.mark.parametrize("family", FAMILIES)
def test_addresses_that_no_element_can_have(family: str, width: int, dtype: str) -> None:
    """torch.frombuffer makes such tensors; they give the usual bits, or an error before a step."""

    def shifted(values: torch.Tensor) -> torch.Tensor:
        memory = bytearray(values.numel() * values.itemsize + 1)
        result = torch.frombuffer(memory, dtype=values.dtype, offset=1)
        return result.copy_(values)

    results = []
    for place in (torch.Tensor.clone, shifted):
        values = Numbers(("normal",), 1, False).tensor((5000,), DTYPES[dtype])
        g = place(Numbers(("decades",), 2, False).tensor((5000,), DTYPES[dtype]))
        p = place(values).requires_grad_()
        optimizer = build_optimizer(family, [p], optim_bits=width)
        optimizer.init_states()
        p.grad = g
        try:
            for _ in range(2):
                optimizer.step()
        except ConfigError:
            assert torch.equal(p, values)
            return
        results.append(everything(optimizer))
    assert_same(results[1], results[0], "other bits")
