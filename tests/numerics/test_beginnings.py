"""What states begin with, and elements that never have a gradient."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import torch

from optfactory import build_optimizer, resolve
from optfactory.errors import ConfigError
from tests.conftest import on_cpus
from tests.families import ELEMENT_WISE, names_with, selections
from tests.numerics.harness import bits, gradient, parameters, quantized
from tests.reference.quantization import UNSIGNED_CODEC, decode32

BEGINNING = {"initial_accumulator_value": 0.1, "min_8bit_size": 1}
OPTIONS: list[dict[str, Any]] = [{}, {"block_wise": False}, {"block_size": 64}]


@pytest.mark.parametrize("asked", OPTIONS)
@pytest.mark.parametrize("name", names_with(*BEGINNING))
def test_sums_begin_with_exactly_the_value(
    name: str, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optfactory.memory.placement.PAGED_MIN_NUMEL", 1000)
    params = parameters(torch.float32, [(4097,), (70, 64), (3,)])
    asked = asked if "8bit" in name else {}
    optimizer = build_optimizer(name, params, **BEGINNING, **asked)
    optimizer.init_states()
    value = torch.tensor(0.1).item()
    for p in params:
        state = optimizer.state[p]
        if "sum" in state:
            assert (state["sum"] == value).all()
            continue
        stored = quantized(state, "sum")
        assert (stored.scales == torch.tensor(0.1).numpy()).all()
        one = decode32(stored.codes[:1], stored.scales[:1] * 0 + 1, UNSIGNED_CODEC, 4097)
        assert (one == 1).all()
        assert (stored.codes == stored.codes.flat[0]).all()


@pytest.mark.parametrize("wide", [False, True])
def test_further_rows_begin_as_all_did(wide: bool, backend: str) -> None:
    """Blocks that old and new rows share have one scale; so does a tensor."""
    for asked in OPTIONS[: 1 if wide else 3]:
        name = "adagrad32bit" if wide else "adagrad8bit"
        (p,) = parameters(torch.float32, [(65, 64)])
        optimizer = build_optimizer(name, [p], **BEGINNING, **asked)
        p.grad = gradient((65, 64), p.dtype, 1)
        optimizer.step()
        larger = torch.zeros(80, 64, device=p.device).requires_grad_()
        optimizer.replace_parameter(p, larger)
        larger.grad = torch.ones_like(larger)
        optimizer.step()
        want = -0.01 / (0.1 + 1) ** 0.5
        assert (larger[65:] / want - 1).abs().max() < 1e-2


def _selections(family: str, bits_wanted: int) -> list[dict[str, Any]]:
    """Those that have state of this width."""
    found = []
    for asked in selections(family):
        with suppress(ConfigError):
            resolve(family, **asked, optim_bits=bits_wanted)
            found.append(asked)
    return found


@on_cpus
@pytest.mark.parametrize("bits_wanted", [32, 8])
@pytest.mark.parametrize("family", ELEMENT_WISE)
def test_elements_without_a_gradient_stay(family: str, bits_wanted: int, backend: str) -> None:
    """No residue of a code of 0 meets a second moment of 0, whatever else is in the block."""
    for selected in _selections(family, bits_wanted):
        (p,) = parameters(torch.float32, [(16, 512)])
        before = bits(p[:, ::3])
        options = {**selected, "optim_bits": bits_wanted, "weight_decay": 0.0, "lr": 1e-3}
        optimizer = build_optimizer(family, [p], **options)
        for step in range(200):
            p.grad = gradient((16, 512), p.dtype, step)
            p.grad[:, ::3] = 0.0
            optimizer.step()
        assert (bits(p[:, ::3]) == before).all(), selected
        assert not (bits(p) == bits(parameters(torch.float32, [(16, 512)])[0])).all()
