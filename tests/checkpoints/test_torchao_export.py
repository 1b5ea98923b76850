"""State that is written for torchao's low-bit Adam and AdamW, which load it and train on."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch

from optfactory import Optimizer2State, build_optimizer
from optfactory.errors import ConfigError
from tests.checkpoints.harness import alike, array, same
from tests.checkpoints.low_bit import (
    CLASSES,
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
from tests.torch_api.harness import clones, held, snapshot, through_file, train

pytestmark = pytest.mark.usefixtures("uncompiled")


def of_ours(name: str, dtype: Any = torch.float32, **options: Any) -> Optimizer2State:
    optimizer = build_optimizer(name, weights(dtype=dtype), **options)
    train(optimizer, range(3))
    return optimizer


def continued(width: str, optimizer: Optimizer2State, kind: str = "AdamW") -> Any:
    """Theirs of the same parameters, with the state of ours."""
    other = theirs(width, clones(held(optimizer)), kind)
    other.load_state_dict(through_file(optimizer.export_state_dict("torchao")))
    return other


@widths
def test_it_has_the_form_of_their_own(width: str) -> None:
    options = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    want = trained(width, **options).state_dict()
    got = of_ours(WIDTHS[width], **options).export_state_dict("torchao")
    assert got["param_groups"] == want["param_groups"]
    assert got["param_groups"][0]["lr"].dtype == torch.float32
    assert got["state"].keys() == want["state"].keys()
    for index, entries in want["state"].items():
        mine = got["state"][index]
        assert mine.keys() == entries.keys()
        assert mine["step"].dtype == torch.float32
        for key in STATES:
            assert type(mine[key]) is type(entries[key])
            assert (mine[key].shape, mine[key].dtype) == (entries[key].shape, entries[key].dtype)
            for part in vars(entries[key]):
                one, other = getattr(mine[key], part), getattr(entries[key], part)
                facts = [
                    (x.dtype, x.shape) if isinstance(x, torch.Tensor) else x for x in (one, other)
                ]
                assert facts[0] == facts[1], part


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*WIDTHS.values(), "adamw16bit", "adamw", "paged_adamw8bit"])
def test_their_optimizer_goes_on_with_the_same_values(name: str, dtype: torch.dtype) -> None:
    width = next((width for width, own in WIDTHS.items() if own in name), "8bit")
    optimizer = of_ours(name, dtype)
    other = continued(width, optimizer)
    for p, q in zip(held(optimizer), held(other), strict=True):
        assert other.state[q]["step"] == 3
        for key in STATES:
            got, want = values(other.state[q][key]), ours_of(optimizer, p, key)
            assert other.state[q][key].dtype == dtype
            kept = format_of(optimizer, p, key)
            if not is_low_bit(other.state[q][key]):
                assert same(got, array(torch.tensor(want).to(dtype)))
            else:
                assert type(other.state[q][key]).__name__ == CLASSES[width]
                assert_near(got, want, PRECISION[kept])
    train(other, range(3, 5))
    assert all(p.isfinite().all() for p in held(other))


@pytest.mark.parametrize("width", ["8bit", "Fp8"])
def test_codes_stay_in_whole_rows(width: str) -> None:
    optimizer = of_ours(WIDTHS[width])
    other = continued(width, optimizer)
    for index in WHOLE_ROWS:
        mine, state = (o.state[held(o)[index]] for o in (optimizer, other))
        if width == "Fp8":
            assert torch.equal(state["exp_avg"].codes.view(torch.uint8), mine["exp_avg_fp8"])
            got = ours_of(optimizer, held(optimizer)[index], "exp_avg")
            assert np.array_equal(values(state["exp_avg"]), got)
            continue
        for key in STATES:
            assert torch.equal(state[key].codes, mine[f"{key}_q8"])
            assert torch.equal(state[key].scale, mine[f"{key}_absmax"].flatten())
            got = ours_of(optimizer, held(optimizer)[index], key)
            assert alike(values(state[key]), got)


@pytest.mark.parametrize("width", ["8bit", "Fp8"])
def test_their_8_bit_state_comes_back_as_it_was(width: str) -> None:
    """In blocks that rows do not cut; of fp8 the first moment, as ours of second ones differ."""
    other = trained(width)
    back = continued(width, loaded(WIDTHS[width], other))
    for index in WHOLE_ROWS:
        one, two = (o.state[held(o)[index]] for o in (other, back))
        for key in STATES if width == "8bit" else STATES[:1]:
            assert np.array_equal(values(one[key]), values(two[key]))
            assert torch.equal(one[key].scale, two[key].scale)
    if width == "8bit":
        train(other, range(3, 5))
        train(back, range(3, 5))
        for index in WHOLE_ROWS:
            assert torch.equal(held(other)[index], held(back)[index])


@widths
def test_no_second_moment_vanishes(width: str) -> None:
    """Its root divides the momentum that is left: a step would be huge."""
    optimizer = build_optimizer(WIDTHS[width], weights())
    p = held(optimizer)[0]
    for _ in range(3):
        for q in held(optimizer):
            q.grad = torch.zeros_like(q)
        p.grad = 10.0 ** -torch.linspace(0, 12, p.numel())[torch.randperm(p.numel())].reshape(
            p.shape
        )
        optimizer.step()
    other = continued(width, optimizer)
    mine = ours_of(optimizer, p, "exp_avg_sq")
    got = values(other.state[held(other)[0]]["exp_avg_sq"])
    assert (got[mine > 0] > 0).all()
    assert (mine > 0).mean() > 0.9


def test_amsgrad_goes_on_in_32_bits() -> None:
    optimizer = of_ours("adam", amsgrad=True)
    other = continued("8bit", optimizer, "Adam")
    twin = clones(held(optimizer))
    train(other, range(3, 4))
    train(optimizer, range(3, 4))
    for p, q, start in zip(held(optimizer), held(other), twin, strict=True):
        np.testing.assert_allclose(array(p), array(q), rtol=0, atol=1e-6)
        assert not torch.equal(q, start)
    assert other.param_groups[0]["amsgrad"] is True


def test_states_of_several_widths() -> None:
    optimizer = of_ours("adamw", optim_bits=8, state_bits={"exp_avg": 4})
    other = continued("8bit", optimizer)
    state = other.state[held(other)[0]]
    assert [type(state[key]).__name__ for key in STATES] == ["OptimState4bit", "OptimState8bit"]
    train(other, range(3, 4))


def test_parameters_before_their_first_step_have_no_state() -> None:
    exported = build_optimizer("adamw8bit", weights()).export_state_dict("torchao")
    assert exported["state"] == {}
    other = theirs("8bit", weights())
    other.load_state_dict(exported)
    train(other, range(1))


@pytest.mark.parametrize("name", ["adamw8bit", "adamw"])
def test_it_is_a_copy(name: str) -> None:
    """Theirs steps in the very tensors that it loads."""
    optimizer = of_ours(name)
    before = snapshot(optimizer)
    other = theirs("8bit", clones(held(optimizer)))
    other.load_state_dict(optimizer.export_state_dict("torchao"))
    train(other, range(3, 4))
    assert snapshot(optimizer) == before


# ---- what it would not go on with -----------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "asked", "reason"),
    [
        ("adam8bit", {"adam_w_mode": True, "weight_decay": 0.1}, "adds weight decay to the grad"),
        ("adamw8bit", {"adam_w_mode": False}, "adam_w_mode: False here, and torchao's AdamW dec"),
        ("adamw8bit", {"maximize": True}, "maximize: True has no counterpart there"),
        ("adamw8bit", {"bias_correction": False}, "bias_correction: False has no counterpart"),
        ("lion8bit", {}, r"torchao.optim.AdamW\{4bit,8bit,Fp8\} has no lion"),
        ("lamb8bit", {}, "has no lamb"),
    ],
)
def test_what_torchao_does_otherwise_is_refused(
    name: str, asked: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        build_optimizer(name, weights(), **asked).export_state_dict("torchao")


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("adam8bit", {"adam_w_mode": True}),
        ("adamw8bit", {"adam_w_mode": False, "weight_decay": 0.0}),
        ("adamw8bit", {"compat": "bitsandbytes"}),
        ("adamw8bit", {"signed_map": "symmetric", "second_moment_floor": False}),
        ("adamw8bit", {"block_size": 64}),
        ("adamw8bit", {"block_wise": False}),
    ],
    ids=str,
)
def test_what_makes_no_difference_is_taken(name: str, asked: dict[str, Any]) -> None:
    optimizer = of_ours(name, **asked)
    exported = optimizer.export_state_dict("torchao")["state"]
    for index, p in enumerate(held(optimizer)):
        for key in STATES:
            assert_near(values(exported[index][key]), ours_of(optimizer, p, key), PRECISION["8bit"])


def test_how_16_bit_parameters_are_rounded_is_for_its_constructor_to_say() -> None:
    for asked in ({"param_rounding": "stochastic"}, {"master_weights": "none"}):
        exported = of_ours("adamw8bit", torch.bfloat16, **asked).export_state_dict("torchao")
        assert len(exported["state"]) == len(SHAPES)
    for asked, reason in (
        ({"param_rounding": "kahan"}, "param_rounding: 'kahan' here, and torchao rounds to near"),
        ({"master_weights": "split"}, "master_weights: 'split' has no counterpart there"),
    ):
        with pytest.raises(ConfigError, match=reason):
            of_ours("adamw8bit", torch.bfloat16, **asked).export_state_dict("torchao")


def test_without_torchao_an_export_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizers = [of_ours("adamw8bit"), of_ours("adamw")]
    monkeypatch.setitem(sys.modules, "torchao.optim.subclass_8bit", None)
    with pytest.raises(ConfigError, match=r"class OptimState8bit, .* pip install torchao, or exp"):
        optimizers[0].export_state_dict("torchao")
    assert len(optimizers[1].export_state_dict("torchao")["state"]) == len(SHAPES)
