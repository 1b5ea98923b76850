"""Checkpoints of runs with other options: state is converted, and this run's options hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from optfactory import Optimizer2State, build_optimizer
from tests.numerics.harness import parameters, quantized
from tests.options.tools import train
from tests.reference import quantization as q
from tests.reference.base import Options
from tests.reference.quantized import Coding

SHAPE = (20, 300)
KINDS: dict[str, dict[str, Any]] = {
    "blocks": {},
    "whole": {"block_wise": False},
    "symmetric": {"signed_map": "symmetric"},
    "floorless": {"second_moment_floor": False},
    "compat": {"compat": "bitsandbytes"},
}
NAMES = {"exp_avg": True, "exp_avg_sq": False}


def _run(kind: dict[str, Any]) -> Optimizer2State:
    optimizer = build_optimizer("adamw8bit", parameters(torch.float32, [SHAPE]), **kind)
    train(optimizer, range(3))
    return optimizer


def _decoded(optimizer: Optimizer2State, kind: dict[str, Any], name: str) -> np.ndarray:
    (state,) = optimizer.state.values()
    return Coding.of(Options(**kind), NAMES[name], SHAPE).decode(quantized(state, name))


@pytest.mark.parametrize("to", KINDS)
@pytest.mark.parametrize("saved", KINDS)
def test_codes_are_converted_to_this_runs_kind(saved: str, to: str, backend: str) -> None:
    """As if this run had stored the checkpoint's values, or without loss where codes can stay.

    They can in the same kind, and where one scale for all becomes the scale of every block.
    """
    source, target = _run(KINDS[saved]), _run(KINDS[to])
    values = {name: _decoded(source, KINDS[saved], name) for name in NAMES}
    target.load_state_dict(source.state_dict())
    for name, signed in NAMES.items():
        coding = Coding.of(Options(**KINDS[to]), signed, SHAPE)
        seen = coding.seen(values[name].astype(np.float32))
        codes, scales = q.encode(seen, coding.codec, block_size=coding.block_size)
        want = q.decode(codes, scales, coding.codec, coding.block_size).reshape(SHAPE)
        got = _decoded(target, KINDS[to], name)
        if saved == to or (saved == "whole" and (to != "symmetric" or not signed)):
            assert (got == values[name]).all()
            continue
        unit = float(scales.max()) * 1e-6
        want = values[name] if (got == values[name]).all() else want
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=unit)
    for key, value in KINDS[to].items():
        assert target.param_groups[0][key] == value
    train(target, [3])
    assert all(torch.isfinite(p).all() for p in target.param_groups[0]["params"])
