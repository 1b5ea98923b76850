"""Checkpoints of torchao that overflowed, are damaged, or are of something else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from optfactory import build_optimizer
from optfactory.errors import StateError
from tests.checkpoints.low_bit import (
    PRECISION,
    SHAPES,
    STATES,
    assert_near,
    format_of,
    loaded,
    ours_of,
    trained,
    values,
    weights,
    widths,
)
from tests.torch_api.harness import held, snapshot, train

pytestmark = pytest.mark.usefixtures("uncompiled")


@pytest.mark.parametrize("number", [torch.inf, torch.nan])
@pytest.mark.parametrize("name", ["adamw8bit", "adamw_fp8", "adamw4bit"])
@widths
def test_blocks_that_overflowed_start_afresh_in_all_states(
    width: str, name: str, number: float
) -> None:
    """One such gradient makes their scale infinite or NaN, and with it their whole block."""
    other = trained(width)
    p = held(other)[0]
    sound = {key: values(other.state[p][key]) for key in STATES}
    block = 128 if width == "4bit" else 256
    for key in STATES:
        other.state[p][key].scale[3] = number
    other.state[p]["exp_avg_sq"].scale[5] = number
    optimizer = loaded(name, other)
    q = held(optimizer)[0]
    for key in STATES:
        got = ours_of(optimizer, q, key).reshape(-1, block)
        want = sound[key].reshape(-1, block).copy()
        want[[3, 5]] = 0
        # 4-bit codes of second moments have no zero where a scale is not.
        share = PRECISION[format_of(optimizer, q, key)]
        assert_near(got, want, share)
    train(optimizer, range(3, 5))
    assert q.isfinite().all()


def test_fp8_codes_of_nan_start_afresh() -> None:
    other = trained("Fp8")
    state = other.state[held(other)[0]]
    state["exp_avg_sq"].codes.view(torch.uint8)[2, 5] = 0x7F
    state["exp_avg"].codes.view(torch.uint8)[2, 6] = 0xFF
    optimizer = loaded("adamw8bit", other)
    for key in STATES:
        got, want = ours_of(optimizer, held(optimizer)[0], key), values(state[key])
        assert (got[2, 5:7] == 0).all()
        want[2, 5:7] = 0
        assert_near(got, want, PRECISION["8bit"])
    wide = loaded("adamw", other)
    assert np.isnan(ours_of(wide, held(wide)[0], "exp_avg")[2, 6])


def drop(part: str) -> Callable[[Any], None]:
    return lambda state: delattr(state, part)


def put(part: str, value: Callable[[Tensor], object]) -> Callable[[Any], None]:
    return lambda state: setattr(state, part, value(getattr(state, part)))


DAMAGE: list[tuple[str, Callable[[Any], None], str]] = [
    ("8bit", drop("scale"), r"scale: missing in the checkpoint"),
    ("Fp8", drop("codes"), r"codes: missing in the checkpoint"),
    ("4bit", drop("qmap"), r"qmap: missing in the checkpoint"),
    ("8bit", put("scale", lambda x: x[:-1]), r"scale: 35 scales, which do not divide 9216"),
    ("8bit", put("scale", lambda x: x[:0]), r"scale: 0 scales, which do not divide 9216"),
    ("4bit", put("scale", lambda x: x.reshape(18, 4)), r"scale: expected shape \(72,\)"),
    ("Fp8", put("scale", torch.Tensor.double), r"scale: expected torch.float32"),
    ("Fp8", put("scale", torch.neg), r"scale: has scales that are negative"),
    ("8bit", put("codes", lambda x: x[:9]), r"codes: expected shape \(18, 512\), got \(9, 512\)"),
    ("8bit", put("codes", torch.Tensor.char), r"codes: expected torch.uint8, got torch.int8"),
    ("4bit", put("codes", lambda x: x[:-1]), r"codes: expected shape \(4608,\), got \(4607,\)"),
    ("Fp8", put("codes", lambda x: x.view(torch.uint8)), r"codes: expected torch.float8_e4m3fn"),
    ("8bit", put("qmap", lambda x: x[:16]), r"qmap: expected shape \(256,\)"),
    ("4bit", put("qmap", lambda x: 2 * x), r"qmap: expected 16 numbers from -1 to 1"),
    ("8bit", put("qmap", lambda x: x * torch.nan), r"qmap: expected 256 numbers from -1 to 1"),
    ("8bit", put("codes", lambda x: None), r"codes: missing in the checkpoint"),
    ("8bit", put("codes", lambda x: [1]), r"codes: expected a tensor, got list"),
]


@pytest.mark.parametrize(("width", "damage", "reason"), DAMAGE, ids=[item[2] for item in DAMAGE])
def test_damaged_states_are_refused(width: str, damage: Callable[[Any], None], reason: str) -> None:
    other = trained(width)
    saved = other.state_dict()
    damage(saved["state"][0]["exp_avg"])
    optimizer = build_optimizer("adamw8bit", weights())
    train(optimizer, range(1))
    before = snapshot(optimizer)
    with pytest.raises(StateError, match=rf"1 problem.*\n.*exp_avg\.{reason}"):
        optimizer.load_state_dict(saved)
    assert snapshot(optimizer) == before


def test_negative_second_moments_are_refused() -> None:
    for width, reason in {
        "Fp8": "has negative elements",
        "8bit": "256 numbers from 0 to 1",
    }.items():
        saved = trained(width).state_dict()
        saved["state"][0]["exp_avg_sq"] = saved["state"][0]["exp_avg"]
        with pytest.raises(StateError, match=reason):
            build_optimizer("adamw8bit", weights()).load_state_dict(saved)


@widths
def test_states_of_another_model_are_refused(width: str) -> None:
    saved = trained(width).state_dict()
    others = weights([(512, 18), *SHAPES[1:]])
    with pytest.raises(StateError, match=r"exp_avg: expected shape \(512, 18\), got \(18, 512\)"):
        build_optimizer("adamw", others).load_state_dict(saved)


@pytest.mark.parametrize("name", ["lion8bit", "lamb8bit", "sgd"])
def test_other_families_are_refused(name: str) -> None:
    saved = trained("8bit").state_dict()
    with pytest.raises(StateError, match=r"the checkpoint is of family 'adam' or 'adamw'"):
        build_optimizer(name, weights()).load_state_dict(saved)


def test_sharded_states_are_refused(one_process: Callable[[Tensor], Tensor]) -> None:
    saved = trained("8bit").state_dict()
    saved["state"][0]["exp_avg"] = one_process(saved["state"][0]["exp_avg"])
    with pytest.raises(StateError, match=r"state\[0\].exp_avg: is a DTensor of torchao's OptimSt"):
        build_optimizer("adamw8bit", weights()).load_state_dict(saved)


@pytest.fixture
def one_process(tmp_path: Path) -> Any:
    """Makes a DTensor of a tensor that is all of it."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        mesh = init_device_mesh("cpu", (1,))
        yield lambda local: DTensor.from_local(local, mesh, [Shard(0)], run_check=False)
    finally:
        distributed.destroy_process_group()
