"""Checkpoints of torchao's low-bit Adam and AdamW: read, from files too, and gone on from."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from optfactory import build_optimizer, load_checkpoint, save_checkpoint
from optfactory.errors import StateError
from tests.checkpoints.harness import array, same
from tests.checkpoints.low_bit import (
    PRECISION,
    SHAPES,
    STATES,
    WHOLE_ROWS,
    WIDTHS,
    assert_near,
    format_of,
    is_low_bit,
    loaded,
    ours_of,
    theirs,
    trained,
    values,
    weights,
    widths,
)
from tests.reference import adam as oracle
from tests.reference.base import Options, State
from tests.torch_api.harness import clones, held, train

pytestmark = pytest.mark.usefixtures("uncompiled")


@pytest.mark.parametrize("name", [*WIDTHS.values(), "adamw16bit", "adamw", "paged_adamw8bit"])
@widths
def test_states_of_any_width_become_those_of_any_width(width: str, name: str) -> None:
    options = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    other = trained(width, **options)
    optimizer = loaded(name, other)
    assert sum(is_low_bit(s) for e in other.state.values() for s in e.values()) in (6, 8)
    (group,) = optimizer.param_groups
    assert type(group["lr"]) is float
    assert group["lr"] == float(np.float32(0.02))
    assert {key: group[key] for key in options} == {**options, "lr": group["lr"]}
    for p, q in zip(held(other), held(optimizer), strict=True):
        assert optimizer.state[q]["step"] == 3
        for key in STATES:
            got, want = ours_of(optimizer, q, key), values(other.state[p][key])
            assert_near(got, want, PRECISION[format_of(optimizer, q, key)])
    train(optimizer, range(3, 5))


def test_8_bit_codes_and_scales_stay_in_whole_rows() -> None:
    other = trained("8bit")
    for block in (64, 256):
        optimizer = loaded("adamw8bit", other, block_size=block)
        for index in WHOLE_ROWS:
            state, mine = (o.state[held(o)[index]] for o in (other, optimizer))
            for key in STATES:
                assert torch.equal(mine[f"{key}_q8"], state[key].codes)
                scales = state[key].scale.repeat_interleave(256 // block)
                assert torch.equal(mine[f"{key}_absmax"].flatten(), scales)


def test_fp8_codes_of_signed_states_stay_in_whole_rows() -> None:
    other = trained("Fp8")
    optimizer = loaded("adamw_fp8", other)
    for index in WHOLE_ROWS:
        state, mine = (o.state[held(o)[index]] for o in (other, optimizer))
        codes = state["exp_avg"].codes.view(torch.uint8)
        assert torch.equal(mine["exp_avg_fp8"], torch.where(codes == 128, 0, codes))
        got = ours_of(optimizer, held(optimizer)[index], "exp_avg")
        assert np.array_equal(got, values(state["exp_avg"]))


def test_fp8_codes_of_minus_zero_become_those_of_zero() -> None:
    other = trained("Fp8")
    codes = other.state[held(other)[0]]["exp_avg"].codes
    codes[0, :9] = -0.0
    optimizer = loaded("adamw_fp8", other)
    assert (optimizer.state[held(optimizer)[0]]["exp_avg_fp8"][0, :9] == 0).all()


def test_codes_stay_where_the_map_differs_in_last_bits() -> None:
    """It is computed, and its last bits depend on the processor."""
    other = trained("8bit")
    state = other.state[held(other)[0]]["exp_avg"]
    state.qmap.copy_(torch.nextafter(state.qmap, torch.zeros(256)))
    optimizer = loaded("adamw8bit", other)
    assert torch.equal(optimizer.state[held(optimizer)[0]]["exp_avg_q8"], state.codes)
    state.qmap[3] *= 0.99
    optimizer = loaded("adamw", other)
    got = ours_of(optimizer, held(optimizer)[0], "exp_avg")
    assert same(got, values(state))


@pytest.mark.parametrize("block", [64, 512])
@widths
def test_blocks_of_another_size(width: str, block: int) -> None:
    other = trained(width, block_size=block)
    optimizer = loaded("adamw", other)
    for p, q in zip(held(other), held(optimizer), strict=True):
        for key in STATES:
            assert same(ours_of(optimizer, q, key), values(other.state[p][key]))


@pytest.mark.parametrize("kind", ["Adam", "AdamW"])
@widths
def test_a_step_in_32_bits_is_one_in_float64_from_their_state(width: str, kind: str) -> None:
    other = theirs(width, weights(), kind, lr=0.01, weight_decay=0.1)
    train(other, range(3))
    optimizer = loaded(kind.lower(), other)
    before = [array(p).astype(float) for p in held(optimizer)]
    train(optimizer, range(3, 4))
    asked = Options(lr=float(np.float32(0.01)), weight_decay=0.1, adam_w_mode=kind == "AdamW")
    for p, q, start in zip(held(other), held(optimizer), before, strict=True):
        moments = {key: values(other.state[p][key]).astype(float) for key in STATES}
        assert q.grad is not None
        update = oracle.step(start, array(q.grad), State(3, moments), asked)
        np.testing.assert_allclose(array(q), update.p.value, rtol=0, atol=5e-7)


@widths
def test_states_of_16_bit_parameters(width: str) -> None:
    other = trained(width, dtype=torch.bfloat16, bf16_stochastic_round=True)
    optimizer = loaded("adamw", other, param_rounding="stochastic")
    for p, q in zip(held(other), held(optimizer), strict=True):
        for key in STATES:
            assert optimizer.state[q][key].dtype == torch.float32
            assert same(array(optimizer.state[q][key]), values(other.state[p][key]))
    assert optimizer.param_groups[0]["param_rounding"] == "stochastic"
    train(optimizer, range(3, 5))


@widths
def test_amsgrads_maxima_are_read_where_there_is_amsgrad(width: str) -> None:
    key = "max_exp_avg_sq"
    other = trained(width)
    other.param_groups[0]["amsgrad"] = True  # its steps have no maximum of low-bit state
    for state in other.state.values():
        state[key] = state["exp_avg_sq"]
    optimizer = loaded("adamw", other, amsgrad=True)
    for p, q in zip(held(other), held(optimizer), strict=True):
        assert same(array(optimizer.state[q][key]), values(other.state[p][key]))
    with pytest.raises(StateError, match="amsgrad: the checkpoint has True, the config False"):
        loaded("adamw8bit", other)


def test_adam_and_adamw_take_each_others_state_as_torchs() -> None:
    """Its state dicts do not say which one wrote them."""
    for kind in ("Adam", "AdamW"):
        other = theirs("8bit", weights(), kind, weight_decay=0.1)
        train(other, range(1))
        for name in ("adam8bit", "adamw8bit"):
            assert loaded(name, other).param_groups[0]["adam_w_mode"] == (name == "adamw8bit")


def test_small_parameters_alone_have_the_state_dict_of_torch() -> None:
    other = theirs("8bit", weights([(7,), (3, 5)]))
    train(other, range(2))
    optimizer = loaded("adamw8bit", other)
    for p, q in zip(held(other), held(optimizer), strict=True):
        assert same(ours_of(optimizer, q, "exp_avg"), array(other.state[p]["exp_avg"]))


def test_reading_needs_no_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    other = trained("4bit")
    saved = other.state_dict()
    for module in [name for name in sys.modules if name.partition(".")[0] == "torchao"]:
        monkeypatch.setitem(sys.modules, module, None)
    optimizer = build_optimizer("adamw8bit", clones(held(other)))
    optimizer.load_state_dict(saved)
    assert len(optimizer.state) == len(SHAPES)


# ---- files ----------------------------------------------------------------------------------


@widths
def test_checkpoint_files_hold_torchaos_state_and_ours_for_it(width: str, tmp_path: Path) -> None:
    other = trained(width)
    path = tmp_path / "last.pt"
    save_checkpoint(path, other.state_dict())
    optimizer = build_optimizer(WIDTHS[width], clones(held(other)))
    optimizer.load_state_dict(load_checkpoint(path))
    save_checkpoint(path, optimizer.export_state_dict("torchao"))
    other.load_state_dict(load_checkpoint(path))
    train(other, range(3, 4))


def test_a_file_with_its_classes_says_what_to_import(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, trained("8bit").state_dict())
    with nothing_declared_safe(), pytest.raises(StateError, match=r"is imported.*Import it"):
        load_checkpoint(path)


@contextmanager
def nothing_declared_safe() -> Iterator[None]:
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        yield
    finally:
        torch.serialization.add_safe_globals(before)
