"""Checkpoints of torch.optim.Adam and AdamW: read, gone on from, and written."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from optfactory import build_optimizer
from optfactory.errors import ConfigError, StateError
from tests.checkpoints.harness import array, assert_quantized, same, values_of, weights
from tests.torch_api.harness import clones, held, snapshot, through_file, train

pytestmark = pytest.mark.usefixtures("small_tensors")

ADAM, ADAMW = torch.optim.Adam, torch.optim.AdamW


def trained(kind: Any, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    optimizer = kind(weights(dtype=dtype), **options)
    train(optimizer, range(4))
    return optimizer


def difference(one: Any, other: Any) -> float:
    """The largest difference of a parameter of two optimizers."""
    pairs = zip(held(one), held(other), strict=True)
    return max(float((p.detach().float() - q.detach().float()).abs().max()) for p, q in pairs)


# ---- groups ---------------------------------------------------------------------------------


def two_groups(p: list[torch.Tensor]) -> list[dict[str, Any]]:
    return [
        {"params": [x for x in p if x.ndim > 1], "weight_decay": 0.1},
        {"params": [x for x in p if x.ndim <= 1], "weight_decay": 0.0},
    ]


def test_the_hint_on_a_trainers_two_groups_loads_its_checkpoint() -> None:
    torchs = ADAMW(two_groups(weights()), lr=0.01)
    train(torchs, range(4))
    saved = torchs.state_dict()
    with pytest.raises(StateError) as caught:
        build_optimizer("adamw", weights()).load_state_dict(saved)
    assert "param groups of [3, 3] parameters, this optimizer of [6]; build it" in str(caught.value)
    assert "and param_groups='no_decay_1d' makes groups of these sizes" in str(caught.value)
    ours = build_optimizer("adamw", weights(), param_groups="no_decay_1d")
    ours.load_state_dict(saved)
    assert [group["weight_decay"] for group in ours.param_groups] == [0.1, 0.0]
    for p, q in zip(held(torchs), held(ours), strict=True):
        assert torch.equal(torchs.state[p]["exp_avg"], ours.state[q]["exp_avg"])


@pytest.mark.parametrize(
    ("saved", "here"),
    [
        ([[2, 2], [3], [4, 5]], [2, 2, 3, 4, 5]),  # of other groups
        ([[2, 2], [3]], [1, 2, 3]),  # the rules' first group would be the one without decay
        ([[2, 2], [1]], [2, 2, 2]),
        ([[2, 2], [1]], [2, 1, 1]),
        ([[2, 2], [1]], [2, 2, 1, 1]),
    ],
)
def test_groups_that_the_ready_rule_does_not_make_get_no_hint(
    saved: list[list[int]], here: list[int]
) -> None:
    def tensors(dims: list[int]) -> list[torch.Tensor]:
        return [torch.zeros((2,) * ndim).requires_grad_() for ndim in dims]

    torchs = ADAMW([{"params": tensors(dims)} for dims in saved])
    ours = build_optimizer("adamw", tensors(here))
    with pytest.raises(StateError, match=r"same groups$"):
        ours.load_state_dict(torchs.state_dict())


# ---- reading --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["{}", "paged_{}32bit"])
@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"foreach": True},
        {"fused": True},
        {"amsgrad": True},
        {"amsgrad": True, "fused": True},
        {"maximize": True},
        {"lr": torch.tensor(0.01)},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [ADAM, ADAMW])
def test_going_on_from_torch_is_going_on_in_torch(
    kind: Any, variant: dict[str, Any], name: str
) -> None:
    options = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1, **variant}
    torchs = trained(kind, **options)
    ours = build_optimizer(
        name.format(kind.__name__.lower()),
        clones(held(torchs)),
        amsgrad=variant.get("amsgrad", False),
    )
    ours.load_state_dict(through_file(torchs.state_dict()))
    for p, q in zip(held(torchs), held(ours), strict=True):
        assert ours.state[q].keys() == torchs.state[p].keys()
        for key, value in torchs.state[p].items():
            assert same(array(ours.state[q][key]), array(value)), key
    (group,) = ours.param_groups
    for key in ("lr", "betas", "eps", "weight_decay"):
        assert group[key] == options[key]
    assert group["maximize"] == variant.get("maximize", False)
    assert group["is_paged"] == name.startswith("paged")
    assert not {"foreach", "fused", "differentiable"} & group.keys()
    train(torchs, range(4, 14))
    train(ours, range(4, 14))
    assert difference(torchs, ours) < 2e-6


def test_switches_of_torchs_implementation_mean_nothing_here() -> None:
    saved = trained(ADAM).state_dict()
    saved["param_groups"][0] |= {"capturable": True, "fused": True, "differentiable": True}
    ours = build_optimizer("adam", weights())
    ours.load_state_dict(saved)
    assert not ours.param_groups[0]["capturable"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_states_in_the_parameters_dtype_become_float32(dtype: torch.dtype) -> None:
    torchs = trained(ADAMW, dtype)
    ours = build_optimizer("adamw", clones(held(torchs)))
    ours.load_state_dict(through_file(torchs.state_dict()))
    for p, q in zip(held(torchs), held(ours), strict=True):
        assert torchs.state[p]["exp_avg"].dtype == dtype
        assert ours.state[q]["exp_avg"].dtype == torch.float32
        assert same(values_of(ours.state[q], "exp_avg"), array(torchs.state[p]["exp_avg"]))
    train(ours, range(4, 6))


@pytest.mark.parametrize("block", [64, 256])
@pytest.mark.parametrize("name", ["adamw8bit", "paged_adamw8bit"])
def test_32_bits_are_quantized_where_the_config_says_8(name: str, block: int) -> None:
    torchs = trained(ADAMW)
    ours = build_optimizer(name, clones(held(torchs)), block_size=block)
    ours.load_state_dict(through_file(torchs.state_dict()))
    eights = 0
    for p, q in zip(held(torchs), held(ours), strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            wanted = array(torchs.state[p][key])
            if f"{key}_q8" not in ours.state[q]:
                assert same(array(ours.state[q][key]), wanted)
                continue
            assert_quantized(ours.state[q], wanted, key, block=block)
            eights += 1
    assert eights == 8
    train(torchs, range(4, 14))
    train(ours, range(4, 14))
    assert difference(torchs, ours) < 5e-3  # ten steps of at most 1e-3, in 8 bits


@pytest.mark.parametrize("step", [5, 5.0, torch.tensor(5), torch.tensor(5.0).double()], ids=repr)
def test_steps_of_any_type_are_read(step: Any) -> None:
    saved = trained(ADAM).state_dict()
    saved["state"][0]["step"] = step
    ours = build_optimizer("adam", weights())
    ours.load_state_dict(saved)
    step_of_first = ours.state[held(ours)[0]]["step"]
    assert (step_of_first.dtype, step_of_first.item()) == (torch.float64, 5.0)


def test_elements_that_overflowed_start_afresh_in_both_8_bit_states() -> None:
    saved = trained(ADAM).state_dict()
    saved["state"][0]["exp_avg_sq"][3, 7] = torch.inf
    saved["state"][0]["exp_avg"][4, 9] = torch.nan
    ours = build_optimizer("adam8bit", weights())
    ours.load_state_dict(saved)
    for name in ("exp_avg", "exp_avg_sq"):
        values = values_of(ours.state[held(ours)[0]], name)
        assert values[3, 7] == values[4, 9] == 0
        assert (values != 0).sum() > 9000


def test_groups_with_labels_and_unlike_decays() -> None:
    def groups(params: list[Any]) -> list[dict[str, Any]]:
        decay = {"params": params[:2], "weight_decay": 0.1, "name": "decayed"}
        return [decay, {"params": params[2:], "weight_decay": 0.0}]

    torchs = ADAMW(groups(weights()), lr=0.01)
    scheduler = torch.optim.lr_scheduler.LinearLR(torchs, 0.5, 1.0, 10)
    train(torchs, range(3))
    scheduler.step()
    ours = build_optimizer("adamw", groups(clones(held(torchs))))
    ours.load_state_dict(through_file(torchs.state_dict()))
    assert [group["weight_decay"] for group in ours.param_groups] == [0.1, 0.0]
    assert ours.param_groups[0]["name"] == "decayed"
    assert ours.param_groups[1]["initial_lr"] == 0.01
    train(torchs, range(3, 6))
    train(ours, range(3, 6))
    assert difference(torchs, ours) < 1e-6


@pytest.mark.parametrize(
    ("kind", "options", "loaded_by", "config", "words"),
    [
        (ADAM, {"weight_decay": 0.1}, "adamw", {}, ["optimizer", "'adam'", "0.1", "adam_w_mode"]),
        (ADAMW, {}, "adam8bit", {}, ["optimizer", "'adamw'", "0.01"]),
        (ADAM, {}, "lamb", {}, ["optimizer", "'adam'", "'lamb'"]),
        (ADAM, {"amsgrad": True}, "adam", {}, ["amsgrad", "True", "False", "build"]),
        (ADAM, {}, "adam", {"amsgrad": True}, ["amsgrad", "True", "False", "build"]),
    ],
)
@pytest.mark.parametrize("steps", [0, 2])
def test_what_torch_computes_otherwise_is_refused(
    kind: Any, options: Any, loaded_by: str, config: Any, words: list[str], steps: int
) -> None:
    torchs = kind(weights(), **options)
    train(torchs, range(steps))
    ours = build_optimizer(loaded_by, weights(), **config)
    train(ours, range(1))
    before = snapshot(ours)
    with pytest.raises(StateError) as caught:
        ours.load_state_dict(through_file(torchs.state_dict()))
    assert snapshot(ours) == before
    for word in ["param_groups[0]", *words]:
        assert word in str(caught.value)


def test_adam_and_adamw_are_one_without_decay() -> None:
    torchs = trained(ADAM)
    ours = build_optimizer("adamw", clones(held(torchs)))
    ours.load_state_dict(torchs.state_dict())
    assert ours.param_groups[0]["weight_decay"] == 0
    assert ours.param_groups[0]["adam_w_mode"] is True
    train(torchs, range(4, 8))
    train(ours, range(4, 8))
    assert difference(torchs, ours) < 1e-6


def test_a_maximum_that_is_missing_is_named() -> None:
    saved = trained(ADAM, amsgrad=True).state_dict()
    del saved["state"][1]["max_exp_avg_sq"]
    ours = build_optimizer("adam", [(f"w{i}", p) for i, p in enumerate(weights())], amsgrad=True)
    with pytest.raises(StateError, match=r"w1\.max_exp_avg_sq: missing"):
        ours.load_state_dict(saved)


# ---- writing --------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["adamw", "adam", "paged_adamw", "adamw8bit", "paged_adam8bit"])
def test_torch_loads_an_export_and_goes_on(name: str, fused: bool) -> None:
    kind = ADAMW if "adamw" in name else ADAM
    ours = build_optimizer(name, weights(), lr=0.01, betas=(0.8, 0.95), weight_decay=0.1)
    train(ours, range(4))
    exported = through_file(ours.export_state_dict("torch"))
    torchs = kind(clones(held(ours)), lr=0.5, fused=fused)
    torchs.load_state_dict(exported)
    for p, q in zip(held(torchs), held(ours), strict=True):
        assert torchs.state[p]["step"] == 4
        for key in ("exp_avg", "exp_avg_sq"):
            assert same(array(torchs.state[p][key]), values_of(ours.state[q], key))
    (group,) = torchs.param_groups
    assert group["lr"] == 0.01
    assert group["betas"] == (0.8, 0.95)
    assert group.keys() == kind(weights()).param_groups[0].keys()
    # A step moves the parameters by moments that are not yet quantized anew.
    train(torchs, range(4, 5))
    train(ours, range(4, 5))
    assert difference(torchs, ours) < 1e-6
    train(torchs, range(5, 15))
    train(ours, range(5, 15))
    assert difference(torchs, ours) < (0.05 if "8bit" in name else 2e-6)


@pytest.mark.parametrize("switch", ["amsgrad", "maximize"])
def test_torch_loads_an_export_with_a_switch(switch: str) -> None:
    ours = build_optimizer("adamw", weights(), lr=0.01, **{switch: True})
    train(ours, range(4))
    torchs = ADAMW(clones(held(ours)), amsgrad=switch == "amsgrad")
    torchs.load_state_dict(ours.export_state_dict("torch"))
    train(torchs, range(4, 10))
    train(ours, range(4, 10))
    assert difference(torchs, ours) < 2e-6


def test_an_export_is_a_copy() -> None:
    ours = build_optimizer("paged_adamw", weights(), lr=0.01)
    train(ours, range(2))
    exported = ours.export_state_dict("torch")
    before = copy.deepcopy(exported)
    torchs = ADAMW(weights())
    torchs.load_state_dict(exported)
    wanted = snapshot(ours)
    train(torchs, range(2, 4))
    assert snapshot(ours) == wanted
    train(ours, range(2, 4))
    assert before["param_groups"] == exported["param_groups"]


def test_what_has_no_state_has_none_in_an_export() -> None:
    params = weights()
    params[0].requires_grad_(False)
    ours = build_optimizer("adamw8bit", params)
    assert ours.export_state_dict("torch")["state"] == {}
    ours.init_states()
    exported = ours.export_state_dict("torch")
    assert list(exported["state"]) == [1, 2, 3, 4, 5]
    back = build_optimizer("adamw8bit", weights())
    back.load_state_dict(exported)
    assert [p in back.state for p in held(back)] == [False, True, True, True, True, True]


def test_an_export_keeps_names_and_labels_of_groups() -> None:
    named = [(f"w{i}", p) for i, p in enumerate(weights())]
    ours = build_optimizer("adamw", [{"params": named, "name": "all", "initial_lr": 0.5}])
    (group,) = ours.export_state_dict("torch")["param_groups"]
    assert group["name"] == "all"
    assert group["initial_lr"] == 0.5
    assert group["param_names"] == [name for name, _ in named]
    assert group["params"] == list(range(6))


@pytest.mark.parametrize(
    ("name", "options", "word"),
    [
        ("lamb", {}, "has no lamb"),
        ("adam", {"bias_correction": False}, r"param_groups\[0\].bias_correction: False"),
    ],
)
def test_what_torch_would_not_go_on_with_is_refused(name: str, options: Any, word: str) -> None:
    ours = build_optimizer(name, weights(), **options)
    with pytest.raises(ConfigError, match=word):
        ours.export_state_dict("torch")


def test_an_unknown_layout_is_refused_with_the_known_ones() -> None:
    ours = build_optimizer("adam", weights())
    with pytest.raises(ConfigError, match=r"'apex'.*torch, bitsandbytes or torchao"):
        ours.export_state_dict("apex")
