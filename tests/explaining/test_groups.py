"""Groups as explained against the optimizer that is built, and rates against arithmetic by hand."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from optfactory import build_optimizer, explain, list_rules, ready_rules
from optfactory.errors import ConfigError
from optfactory.explaining.figures import OWN, Group
from tests.explaining.models import tiny

DECAYING = {"ndim": "<=1", "weight_decay": 0.0}
HEAD = {"match": "head.*"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("adamw8bit", {"lr": 3e-4}),
    **{rule: ("adamw8bit", {"param_groups": rule}) for rule in list_rules() if rule != "llama"},
    "vit": ("lamb8bit", {"param_groups": ["vit_layer_decay", "embeddings_32bit"], "lr": 0.1}),
    "scale": ("adam", {"param_groups": {"head": {**HEAD, "lr_scale": 10}}}),
    "both": (
        "adamw",
        {"param_groups": {"deep": {"layer_decay": 0.7}, "head": {**HEAD, "lr_scale": 3.7}}},
    ),
    "later_wins": (
        "paged_adamw8bit",
        {
            "param_groups": {
                "a": {**HEAD, "lr_scale": 2, "weight_decay": 0.5, "eps": 1e-7},
                "b": {"ndim": 1, "lr_scale": 3, "weight_decay": 0.25},
            }
        },
    ),
    "own_lr": ("sgd8bit", {"momentum": 0.5, "param_groups": {"a": {**HEAD, "lr": "3e-3"}}}),
    "own_optimizer": (
        "adamw8bit",
        {
            "param_groups": {
                "decay": {**DECAYING, "betas": [0.5, 0.6]},
                "lion": {**HEAD, "optimizer": "lion8bit", "lr_scale": 0.1},
            }
        },
    ),
    "narrow": (
        "adamwfp8",
        {"param_groups": {"w": {"modules": "Linear", "optim_bits": 16, "lr": 0.25}}},
    ),
    "muon": ("muon8bit", {"lr": 0.02, "others": {"name": "adam8bit", "lr": 3e-4, "eps": 1e-6}}),
    "muon_rules": (
        "paged_muon",
        {
            "param_groups": {
                "decay": DECAYING,
                "layers": {"layer_decay": 0.9},
                "head": {"match": "head.weight", "optimizer": "muon", "lr_scale": 0.5},
            }
        },
    ),
    "spelling": ("bnb_adam8bit", {"param_groups": {"a": {**HEAD, "adam_w_mode": False}}}),
}


def given_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Param groups as torch has them, with hyperparameters of their own."""
    named = dict(model.named_parameters())
    head = [(k, v) for k, v in named.items() if k.startswith("head")]
    rest = [(k, v) for k, v in named.items() if not k.startswith("head")]
    return [{"params": rest}, {"params": head, "lr": 0.5, "weight_decay": 0.125, "name": "mine"}]


def assert_as_built(groups: tuple[Group, ...], optimizer: torch.optim.Optimizer) -> None:
    assert len(groups) == len(optimizer.param_groups)
    for index, (told, real) in enumerate(zip(groups, optimizer.param_groups, strict=True)):
        hyperparameters = {
            key: value
            for key, value in real.items()
            if key not in ("params", "param_names", "name", "format_version")
        }
        assert dict(told.values) == hyperparameters
        assert told.rate.value == real["lr"]
        assert told.optimizer == real["optimizer"]
        assert told.name == real.get("name", str(index))
        assert list(told.parameters) == real["param_names"]
        assert told.elements == sum(p.numel() for p in real["params"])
        for setting in told.settings:
            assert setting.value == real[setting.key]


@pytest.mark.parametrize("case", CASES)
def test_every_group_is_as_the_optimizer_has_it(case: str) -> None:
    name, overrides = CASES[case]
    model = tiny()
    optimizer = build_optimizer(name, model, **overrides)
    told = explain(name, model, **overrides)
    assert told.groups is not None
    assert_as_built(told.groups, optimizer)
    rows = {row.name: row for row in optimizer.memory_report().rows}
    for group in told.groups:
        assert sum(states.nbytes for states in group.states) == sum(
            rows[name].nbytes for name in group.parameters
        )
        for states in group.states:
            assert {rows[name].where for name in states.names} == {states.place}
            bits = {"8bit": 8, "fp8": 8, "16bit": 16, "32bit": 32}
            widths = {bits[codec] for codec in states.codecs.values()}
            assert {rows[name].bits for name in states.names} == widths
            assert {bool(rows[name].reason) for name in states.names} == {bool(states.reason)}


@pytest.mark.parametrize("rules", [None, {"decay": DECAYING, "head": {**HEAD, "lr_scale": 4}}])
def test_groups_of_the_users_are_as_the_optimizer_has_them(rules: dict[str, Any] | None) -> None:
    model = tiny()
    more = {"param_groups": rules} if rules else {}
    told = explain("adamw8bit", given_groups(model), **more)
    assert told.groups is not None
    assert_as_built(told.groups, build_optimizer("adamw8bit", given_groups(model), **more))
    own = told.groups[-1]
    decay = next(setting for setting in own.settings if setting.key == "weight_decay")
    assert (decay.value, decay.said_by, own.rate.said_by) == (0.125, OWN, OWN)
    assert (own.rate.base, own.rate.value) == (0.5, 2.0 if rules else 0.5)


def test_the_ready_rules_for_llamas_are_as_the_optimizer_has_them() -> None:
    model = tiny()
    model.lm_head = model.head
    del model.head
    told = explain("adamw8bit", model, param_groups="llama")
    assert told.groups is not None
    assert_as_built(told.groups, build_optimizer("adamw8bit", model, param_groups="llama"))
    labels = {label for group in told.groups for label in group.rules}
    assert labels == {"no_decay", "embeddings", "head"} == set(ready_rules("llama"))


# ---- arithmetic, by hand ------------------------------------------------------------------------

# The last layer of three blocks is 4: the embedding is layer 0, what is behind the blocks layer 4.
LAYERS = {"embed.weight": 0, "blocks.0.mix.weight": 1, "blocks.1.mix.bias": 2, "norm.bias": 4}


@pytest.mark.parametrize("decay", [0.75, 0.65, 1.0])
@pytest.mark.parametrize("scale", [None, 10, 0.3])
def test_rates_are_what_arithmetic_by_hand_gives(decay: float, scale: float | None) -> None:
    rules: dict[str, Any] = {"deep": {"layer_decay": decay}}
    if scale is not None:
        rules["scaled"] = {"ndim": 2, "lr_scale": scale}
    told = explain("adamw", tiny(), lr=0.003, param_groups=rules)
    assert told.groups is not None
    group_of = {name: group for group in told.groups for name in group.parameters}
    for name, layer in LAYERS.items():
        rate, below = group_of[name].rate, 4 - layer
        is_scaled = scale is not None and name.endswith(("mix.weight", "embed.weight"))
        expected = 0.003 * decay * decay * decay * decay if below == 4 else 0.003 * decay**below
        expected *= scale if is_scaled and scale is not None else 1
        assert math.isclose(rate.value, expected, rel_tol=1e-15)
        factors = [(factor.key, factor.number, factor.power) for factor in rate.factors]
        assert factors[-1] == ("layer_decay", decay, below)
        assert factors[:-1] == ([("lr_scale", scale, 1)] if is_scaled else [])
        assert math.isclose(rate.base * math.prod(f.value for f in rate.factors), rate.value)


def lines_of(told: object, group: str) -> list[str]:
    """The lines of a group in the text, those that were wrapped in one."""
    blocks = [block.replace("\n    ", " ").splitlines() for block in str(told).split("\n\n")]
    (found,) = [block for block in blocks if block[0].startswith(f"group {group}: ")]
    return [line.strip() for line in found]


def test_the_arithmetic_of_a_rate_is_spelled_out() -> None:
    rules = {"decay": {"layer_decay": 0.75}, "head": {**HEAD, "lr_scale": 10}}
    told = explain("adamw", tiny(), lr=0.001, param_groups=rules)
    three = "lr 0.000421875 = 0.001 x 0.75^3 (layer_decay of 'decay', 3 layers below the last)"
    assert three in lines_of(told, "decay[1]")
    head = (
        "lr 0.01 = 0.001 x 10 (lr_scale of 'head') x 0.75^0 (layer_decay of 'decay', the last "
        "layer)"
    )
    assert head in lines_of(told, "decay[4]+head")


def test_a_setting_says_who_set_it_and_what_it_was() -> None:
    rules = {
        "all": {"ndim": ">=0", "weight_decay": 0.5},
        "no_decay": DECAYING,
        "head": {"match": "head.bias", "lr": 0.25, "eps": 1e-7},
    }
    told = explain("adamw", tiny(), param_groups=rules)
    lines = lines_of(told, "all+no_decay+head")
    assert lines[1:3] == ["head.bias", "rules: all, no_decay, head"]
    assert "lr 0.25 from rule 'head'" in lines
    assert "weight_decay 0.0 from rule 'no_decay' (was 0.01; rule 'all' said 0.5)" in lines
    assert "eps 1e-07 from rule 'head' (was 1e-08)" in lines


def test_another_optimizer_shows_itself_and_its_defaults() -> None:
    told = explain("muon8bit", tiny(), lr=0.02, others={"lr": 3e-4})
    lines = lines_of(told, "others")
    assert "optimizer adamw8bit from rule 'others' (was muon8bit)" in lines
    assert "lr 0.0003 from rule 'others'" in lines
    assert any(line.startswith("defaults of adamw8bit: betas [0.9, 0.999]") for line in lines)
    assert any(line.startswith("no hidden matrix, because it is an embedding") for line in lines)
    assert "lr 0.02" in lines_of(told, "default")


def test_what_a_rules_optimizer_begins_anew_is_not_told_of_earlier_rules() -> None:
    rules = {
        "first": {**HEAD, "betas": [0.5, 0.6], "weight_decay": 0.5},
        "lion": {**HEAD, "optimizer": "lion8bit"},
    }
    told = explain("adamw8bit", tiny(), param_groups=rules)
    (group,) = [group for group in told.groups or () if group.is_other]
    assert {setting.key: setting.said_by for setting in group.settings} == {
        "optimizer": "lion",
        "weight_decay": "first",
    }
    assert group.defaults["betas"] == (0.9, 0.99)
    (warning,) = told.warnings
    assert warning.startswith("param_groups.first.betas: has no effect, the optimizer of rule")


def test_state_says_widths_places_and_why() -> None:
    model = nn.Sequential(nn.Linear(400, 300), nn.Linear(300, 64))
    told = explain("paged_adamw8bit", model)
    lines = [line for line in lines_of(told, "0") if line.startswith("state: ")]
    assert lines[0].startswith("state: exp_avg, exp_avg_sq 8bit, ")
    assert "for 1 tensor, paged (file-mapped): 0.weight" in lines[0]
    assert "(fewer than 100000: not paged): 1.weight" in lines[1]
    assert "exp_avg, exp_avg_sq 32bit, " in lines[2]
    assert "(fewer than min_8bit_size (4096); fewer than" in lines[2]


# ---- what was perhaps not meant ----------------------------------------------------------------


def warnings_of(*args: Any, **kwargs: Any) -> str:
    return "\n".join(explain(*args, **kwargs).warnings)


@pytest.mark.parametrize("key", ["weight_decay", "lr_scale", "lr"])
def test_a_key_that_is_overridden_everywhere_is_told(key: str) -> None:
    rules = {"head": {"match": "head.bias", key: 0.5}, "bias": {"ndim": 1, key: 0.25}}
    said = f"param_groups.head.{key}: has no effect, rule 'bias' overrides it"
    assert said in warnings_of("adamw", tiny(), param_groups=rules)
    backwards = dict(reversed(rules.items()))
    assert not warnings_of("adamw", tiny(), param_groups=backwards)


def test_rules_without_a_match_are_problems_or_warnings() -> None:
    rules = {"a": {"match": "nosuch", "lr": 1}, "b": {"match": "x", "lr": 1, "optional": True}}
    told = explain("adamw", tiny(), param_groups=rules)
    assert [text.partition(";")[0] for text in told.problems] == [
        "param_groups.a: matches no parameter"
    ]
    assert told.warnings == ("param_groups.b: matches no parameter, and is optional",)
    with pytest.raises(ConfigError, match=r"param_groups\.a: matches no parameter"):
        build_optimizer("adamw", tiny(), param_groups=rules)


@pytest.mark.parametrize("more", [{}, {"master_weights": "none"}, {"param_rounding": "kahan"}])
def test_warnings_of_the_built_optimizer_are_told(more: dict[str, Any]) -> None:
    model = tiny().to(torch.bfloat16)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        build_optimizer("adamw", model, **more)
    told = warnings_of("adamw", model, **more)
    assert bool(told) == bool(caught) == (not more)
    if caught:
        assert str(caught[0].message).startswith(told)


def test_matrices_without_names_are_told() -> None:
    params = [p for p in tiny().parameters() if p.ndim == 2]
    assert "the parameters have no names" in warnings_of("muon", params)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"lr": -1}, r"optimizer\.lr"),
        ({"device": "nosuch"}, "device is one such as"),
        ({"param_groups": {"a": {**HEAD, "lr": -1}}}, r"param_groups\.a\.lr"),
        ({"page_memory": "pinned", "is_paged": True}, "page_memory: is for CUDA"),
    ],
)
def test_what_the_optimizer_refuses_is_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        explain("adamw8bit", tiny(), **kwargs)


def test_a_device_that_is_not_here_is_planned_for() -> None:
    model = nn.Linear(400, 300, device="meta")
    told = explain("paged_adamw8bit", model, device="cuda")
    assert told.groups is not None
    assert [states.place for states in told.groups[0].states] == ["managed", "resident"]
