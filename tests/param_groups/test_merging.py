"""What a parameter gets when several rules match it, and what its learning rate becomes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from optfactory import build_optimizer
from tests.param_groups.harness import Net, Rules, built, got, labels

MATCHED = {"head.weight", "head.bias"}


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({"lr": 0.5}, 0.5),
        ({"lr": "1e-2"}, 0.01),
        ({"weight_decay": "0"}, 0.0),
        ({"weight_decay": 0}, 0.0),
        ({"betas": [0.5, "0.6"]}, (0.5, 0.6)),
        ({"betas": "(0.5, 0.6)"}, (0.5, 0.6)),
        ({"eps": "1e-4"}, 1e-4),
        ({"amsgrad": True}, True),
        ({"adam_w_mode": False}, False),
        ({"maximize": True}, True),
        ({"optim_bits": 8}, 8),
        ({"optim_bits": "8"}, 8),
        ({"is_paged": True}, True),
        ({"min_8bit_size": 1}, 1),
        ({"percentile_clipping": 5}, 5),
        ({"skip_zeros": True}, True),
        ({"lr_scale": 5}, 0.005),
        ({"lr_scale": "5"}, 0.005),
    ],
)
def test_an_override_reaches_what_the_rule_matches_alone(
    stated: dict[str, Any], expected: object
) -> None:
    key = "lr" if "lr_scale" in stated else next(iter(stated))
    default = built(Net(), {}).param_groups[0][key]
    found = got(built(Net(), {"head": {"match": "head.*", **stated}}), key)
    for name, value in found.items():
        wanted = expected if name in MATCHED else default
        assert value == wanted, name
        assert type(value) is type(default), name


def test_width_paging_and_the_least_size_act_on_the_state() -> None:
    rules: Rules = {
        "wide": {"match": "embed.*", "optim_bits": 32},
        "paged": {"match": "blocks.0.mix.weight", "is_paged": True},
        "small": {"match": "*.bias", "min_8bit_size": 1},
    }
    model = Net(width=320)
    rows = {row.name: row for row in built(model, rules, "adamw8bit").memory_report().rows}
    assert rows["embed.weight"].bits == 32
    assert rows["blocks.1.mix.weight"].bits == 8
    assert rows["blocks.0.mix.weight"].bits == 8
    assert rows["blocks.0.mix.weight"].where == "file-mapped"
    assert rows["blocks.1.mix.weight"].where == "resident"
    assert rows["blocks.0.mix.bias"].bits == 8
    assert rows["norm.weight"].bits == 32


@pytest.mark.parametrize(("name", "width"), [("paged_adamw8bit", 32), ("paged_lamb32bit", 8)])
def test_a_rule_may_change_what_the_name_states(name: str, width: int) -> None:
    rules = {"head": {"match": "head.*", "optim_bits": width, "is_paged": False}}
    optimizer = built(Net(), rules, name)
    assert got(optimizer, "optim_bits")["head.weight"] == width
    assert got(optimizer, "is_paged") == {
        key: key not in MATCHED for key in got(optimizer, "is_paged")
    }


def test_all_matching_rules_are_merged_and_the_later_one_wins_key_by_key() -> None:
    rules: Rules = {
        "first": {"match": "*", "weight_decay": 0.1, "eps": 1e-3},
        "second": {"match": "*.bias", "weight_decay": 0.2, "betas": [0.5, 0.5]},
        "third": {"match": "head.*", "weight_decay": 0.3},
    }
    optimizer = built(Net(), rules)
    decay, betas, eps = (got(optimizer, key) for key in ("weight_decay", "betas", "eps"))
    assert set(eps.values()) == {1e-3}
    for name in decay:
        bias, head = name.endswith("bias"), name.startswith("head")
        assert decay[name] == (0.3 if head else 0.2 if bias else 0.1), name
        assert betas[name] == ((0.5, 0.5) if bias else (0.9, 0.999)), name
    assert labels(optimizer) == ["first", "first+second", "first+third", "first+second+third"]


def test_the_order_of_rules_decides() -> None:
    one, two = {"match": "head.*", "lr": 0.1}, {"ndim": 1, "lr": 0.2}
    assert got(built(Net(), {"a": one, "b": two}), "lr")["head.bias"] == 0.2
    assert got(built(Net(), {"b": two, "a": one}), "lr")["head.bias"] == 0.1


def test_every_parameter_is_in_one_group_in_the_models_order() -> None:
    model = Net()
    rules = {"biases": {"match": "*.bias", "lr": 0.1}, "one": {"ndim": 1, "eps": 1e-3}}
    groups = built(model, rules).param_groups
    order = {id(p): index for index, p in enumerate(model.parameters())}
    places = [[order[id(p)] for p in group["params"]] for group in groups]
    assert all(found == sorted(found) for found in places)
    assert sorted(index for found in places for index in found) == list(range(len(order)))
    assert [found[0] for found in places] == sorted(found[0] for found in places)
    by_name = dict(model.named_parameters())
    for group in groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            assert by_name[name] is p


def test_without_rules_there_is_one_group_without_a_label() -> None:
    for rules in ({}, None, {"gone": None}):
        groups = build_optimizer("adamw", Net(), param_groups=rules).param_groups
        assert len(groups) == 1
        assert "name" not in groups[0]


def test_a_rule_that_is_null_is_dropped() -> None:
    rules: Rules = {"head": None, "biases": {"match": "*.bias", "lr": 0.1}}
    assert labels(built(Net(), rules)) == ["default", "biases"]


# ---- learning rates --------------------------------------------------------------------------


def test_lr_scale_multiplies_the_base_rate_and_the_later_scale_wins() -> None:
    rules: Rules = {
        "biases": {"match": "*.bias", "lr_scale": 2.0},
        "head": {"match": "head.*", "lr_scale": 10.0},
    }
    rates = got(built(Net(), rules, lr=0.01), "lr")
    for name, rate in rates.items():
        factor = 10 if name in MATCHED else 2 if name.endswith("bias") else 1
        assert rate == 0.01 * factor, name


def test_scale_and_layer_decay_multiply() -> None:
    rules: Rules = {
        "layers": {"layer_decay": 0.5},
        "biases": {"match": "*.bias", "lr_scale": 4.0},
        "norms": {"modules": "LayerNorm", "weight_decay": 0.0},
    }
    rates = got(built(Net(), rules, lr=0.01), "lr")
    # Two blocks: layers 0 (the embedding) to 3 (what is behind the blocks).
    assert rates["embed.weight"] == 0.01 * 0.125
    assert rates["blocks.0.mix.weight"] == 0.01 * 0.25
    assert rates["blocks.1.norm.bias"] == 0.01 * 4 * 0.5
    assert rates["head.weight"] == 0.01
    assert rates["head.bias"] == 0.04


def test_of_two_rules_with_layer_decay_the_later_one_wins() -> None:
    rules: Rules = {
        "all": {"layer_decay": 0.5},
        "mixing": {"modules": "Linear", "layer_decay": 0.25},
    }
    rates = got(built(Net(), rules, lr=1.0), "lr")
    assert rates["blocks.0.norm.weight"] == 0.25
    assert rates["blocks.0.mix.weight"] == 0.0625
    assert rates["head.weight"] == 1.0


def test_a_rate_that_a_rule_states_is_scaled_by_the_layer() -> None:
    rules: Rules = {"all": {"match": "*", "lr": "2e-2"}, "layers": {"layer_decay": 0.5}}
    rates = got(built(Net(), rules), "lr")
    assert rates["head.weight"] == 0.02
    assert rates["blocks.1.mix.weight"] == 0.01


@pytest.mark.parametrize("form", ["override", "mapping", "group"])
def test_a_tensor_lr_stays_a_tensor_in_each_group_and_is_scaled(form: str) -> None:
    lr = torch.tensor(0.5)
    rules: Rules = {"head": {"match": "head.*", "lr_scale": 4.0}, "layers": {"layer_decay": 0.5}}
    model = Net()
    if form == "override":
        optimizer = build_optimizer("adamw", model, lr=lr, param_groups=rules)
    elif form == "mapping":
        cfg = {"name": "adamw", "lr": lr, "param_groups": rules}
        optimizer = build_optimizer(cfg, model)
    else:
        optimizer = built([{"params": model, "lr": lr}], rules)
    rates = got(optimizer, "lr")
    assert all(isinstance(rate, Tensor) and rate.ndim == 0 for rate in rates.values())
    assert rates["head.weight"] == 2.0
    assert rates["norm.weight"] == 0.5
    assert rates["blocks.1.mix.weight"] == 0.25
    assert rates["embed.weight"] == 0.0625
    assert lr == 0.5


# ---- groups of the user's own ----------------------------------------------------------------


def test_a_groups_own_keys_win_over_rules() -> None:
    model = Net()
    groups = [
        {"params": model.embed.named_parameters("embed"), "weight_decay": 0.9, "name": "mine"},
        {"params": model.head.named_parameters("head"), "lr": 0.1},
        {"params": model.norm.named_parameters("norm")},
    ]
    rules: Rules = {
        "all": {"match": "*", "weight_decay": 0.5, "eps": 1e-3},
        "biases": {"match": "*.bias", "weight_decay": 0.0},
        "head": {"match": "head.*", "lr_scale": 3.0},
    }
    optimizer = built(groups, rules, lr=0.01)
    decay, rates = got(optimizer, "weight_decay"), got(optimizer, "lr")
    assert set(got(optimizer, "eps").values()) == {1e-3}
    assert decay["embed.weight"] == 0.9
    assert (decay["norm.weight"], decay["norm.bias"]) == (0.5, 0.0)
    # A scale multiplies whatever rate the parameter has.
    assert rates["head.weight"] == pytest.approx(0.3)
    assert rates["norm.weight"] == 0.01
    expected = ["mine+all", "all+head", "all+biases+head", "all", "all+biases"]
    assert labels(optimizer) == expected


def test_groups_are_not_joined() -> None:
    model = Net()
    groups = [{"params": [p], "lr": 0.1 * (i + 1)} for i, p in enumerate(model.head.parameters())]
    optimizer = built(groups, {"all": {"ndim": ">=0", "weight_decay": 0.0}})
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]


def test_the_callers_groups_and_rules_are_left_as_they_were() -> None:
    model = Net()
    group = {"params": list(model.head.parameters()), "betas": [0.5, 0.5]}
    rules: Rules = {"one": {"ndim": 1, "lr_scale": 2.0, "weight_decay": "0"}}
    before = ({**group, "params": list(group["params"])}, {"one": dict(rules["one"])})
    built([group], rules)
    assert group.keys() == before[0].keys()
    assert group["betas"] == [0.5, 0.5]
    assert all(p is q for p, q in zip(group["params"], before[0]["params"], strict=True))
    assert rules == before[1]
