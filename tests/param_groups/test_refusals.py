"""Rules that cannot be meant: refused by label, all at once, with nothing changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from optfactory import build_optimizer, resolve
from optfactory.errors import ConfigError
from tests.param_groups.harness import Net, Rules, built, names_of, problems, refusal

HEAD = {"match": "head.*"}

# A rule, where the problem is, and what the message says.
WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({**HEAD, "lrscale": 2}, ".lrscale", "did you mean 'lr_scale'?"),
    ({**HEAD, "wieght_decay": 0}, ".wieght_decay", "did you mean 'weight_decay'?"),
    ({**HEAD, "wd": 0}, ".wd", "did you mean 'weight_decay'?"),
    ({"module": "Linear", "ndim": 1, "lr": 1}, ".module", "did you mean 'modules'?"),
    ({"mtach": "head.*", "ndim": 1, "lr": 1}, ".mtach", "did you mean 'match'?"),
    ({**HEAD, "layer_deacy": 0.5, "lr": 1}, ".layer_deacy", "did you mean 'layer_decay'?"),
    ({**HEAD, "optionl": True, "lr": 1}, ".optionl", "did you mean 'optional'?"),
    ({**HEAD, "momentum": 0.9}, ".momentum", "betas"),
    ({**HEAD, "fused": True}, ".fused", "drop the key"),
    ({**HEAD, "trust_ratio": "clip"}, ".trust_ratio", "unknown key"),
    ({"regex": "he(ad", "lr": 1}, ".regex", "regular expression"),
    ({"regex": ["head", "*"], "lr": 1}, ".regex", "regular expression"),
    ({"ndim": "=<1", "lr": 1}, ".ndim", "<=1"),
    ({"ndim": "one", "lr": 1}, ".ndim", "<=1"),
    ({"ndim": "-1", "lr": 1}, ".ndim", "<=1"),
    ({"ndim": -1, "lr": 1}, ".ndim", "<=1"),
    ({"ndim": 1.5, "lr": 1}, ".ndim", "<=1"),
    ({"ndim": True, "lr": 1}, ".ndim", "boolean"),
    ({"ndim": [1, 2], "lr": 1}, ".ndim", "<=1"),
    ({**HEAD, "lr_scale": 0}, ".lr_scale", "greater than 0"),
    ({**HEAD, "lr_scale": -1}, ".lr_scale", "greater than 0"),
    ({**HEAD, "lr_scale": float("nan")}, ".lr_scale", "got nan"),
    ({**HEAD, "lr_scale": float("inf")}, ".lr_scale", "finite"),
    ({**HEAD, "lr_scale": True}, ".lr_scale", "boolean"),
    ({**HEAD, "lr_scale": "much"}, ".lr_scale", "number"),
    ({"layer_decay": 0}, ".layer_decay", "greater than 0"),
    ({"layer_decay": 1.5}, ".layer_decay", "less than or equal to 1"),
    ({"layer_decay": float("nan")}, ".layer_decay", "got nan"),
    ({"lr": 1}, "", "no matcher"),
    ({"optional": True, "lr": 1}, "", "no matcher"),
    ({"match": [], "lr": 1}, "", "no matcher"),
    ({}, "", "no matcher"),
    (HEAD, "", "changes nothing"),
    ({**HEAD, "optional": True}, "", "changes nothing"),
    ({**HEAD, "lr": 1, "lr_scale": 2}, "", "lr_scale"),
    ({**HEAD, "lr": 1, "blocks": "blocks"}, "", "layer_decay"),
    ({**HEAD, "lr": -1}, ".lr", "greater than or equal to 0"),
    ({**HEAD, "lr": True}, ".lr", "boolean"),
    ({**HEAD, "betas": [0.9, 1.0]}, ".betas.1", "less than 1"),
    ({**HEAD, "optim_bits": 12}, ".optim_bits", "8, 16 or 32"),
    ({**HEAD, "optim_bits": 8, "amsgrad": True}, ".amsgrad", "32-bit state"),
    ({**HEAD, "page_dir": "/tmp"}, ".page_dir", "is_paged"),
    ({**HEAD, "name": "lamb"}, ".name", "is optimizer: lamb"),
    ({**HEAD, "name": "adamw", "lr": 1}, ".name", "is optimizer: adamw"),
    ({**HEAD, "param_groups": {}}, ".param_groups", "unknown key"),
    ({**HEAD, "params": []}, ".params", "unknown key"),
    ({"match": 3, "lr": 1}, ".match", ""),
    ({"match": [3], "lr": 1}, ".match.0", ""),
    ({"match": {"a": 1}, "lr": 1}, ".match", ""),
    ({**HEAD, "optional": "perhaps", "lr": 1}, ".optional", ""),
]


@pytest.mark.parametrize(("rule", "where", "said"), WRONG)
def test_a_rule_that_cannot_be_meant_is_refused_by_its_label(
    rule: dict[str, Any], where: str, said: str
) -> None:
    rules = {"fine": {"ndim": 1, "lr": 1}, "mine": rule}
    with pytest.raises(ConfigError) as caught:
        resolve("adamw", param_groups=rules)
    found = caught.value.problems
    (problem,) = [one for one in found if one.startswith(f"optimizer.param_groups.mine{where}: ")]
    assert said in problem
    assert not any("fine" in one for one in found)


@pytest.mark.parametrize("rules", [[], [{"match": "*", "lr": 1}], "lama", 3, {"a": []}, {"a": 1}])
def test_rules_are_a_mapping_of_mappings(rules: Any) -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.param_groups"):
        resolve("adamw", param_groups=rules)


def test_the_rules_of_a_width_are_checked_beside_what_the_name_states() -> None:
    rule = {**HEAD, "amsgrad": True}
    (problem,) = problems(Net(), {"mine": rule}, "adamw8bit")
    assert problem.startswith("optimizer.param_groups.mine.amsgrad: ")
    (problem,) = problems(Net(), {"mine": {**HEAD, "optim_bits": 8}}, "adamw", amsgrad=True)
    assert problem.startswith("optimizer.param_groups.mine.amsgrad: ")
    optimizer = built(Net(), {"mine": {**rule, "optim_bits": 32}}, "adamw8bit")
    assert optimizer.param_groups[-1]["amsgrad"] is True


def test_problems_of_the_config_and_of_all_rules_are_one_error() -> None:
    rules: Rules = {
        "a": {**HEAD, "lr": 1, "lr_scale": 2},
        "b": {"regex": "(", "lr": 1},
        "c": {**HEAD, "epss": 1},
        "d": {"lr": 1},
    }
    with pytest.raises(ConfigError) as caught:
        resolve("adamw", param_groups=rules, wieght_decay=3, eps=-1)
    text = "\n".join(caught.value.problems)
    for place in ("eps: ", "wieght_decay: ", *(f"param_groups.{key}" for key in "abcd")):
        assert f"optimizer.{place}" in text
    assert len(caught.value.problems) == 6


# ---- rules that do not fit the parameters ----------------------------------------------------


@pytest.mark.parametrize(
    ("matchers", "shown"),
    [
        ({"match": "haed.*"}, "embed.weight"),
        ({"regex": "haed"}, "embed.weight"),
        ({"modules": "Conv2d"}, "Embedding"),
        ({"ndim": 7}, ""),
        ({"match": "head.*", "ndim": 7}, ""),
    ],
)
def test_a_rule_that_matches_nothing_says_what_there_is(
    matchers: dict[str, Any], shown: str
) -> None:
    (problem,) = problems(Net(), {"mine": {**matchers, "lr": 1}})
    assert problem.startswith("param_groups.mine: ")
    assert "optional" in problem
    assert shown in problem
    optimizer = built(Net(), {"mine": {**matchers, "lr": 1, "optional": True}})
    assert len(optimizer.param_groups) == 1


def test_a_list_that_the_model_does_not_have_is_named() -> None:
    (problem,) = problems(Net(), {"mine": {"listed_by": "no_weight_decay", "lr": 1}})
    assert problem.startswith("param_groups.mine.listed_by: ")
    assert "'no_weight_decay'" in problem


def test_all_rules_that_match_nothing_are_listed() -> None:
    rules: Rules = {f"r{i}": {"match": f"gone{i}", "lr": 1} for i in range(3)}
    found = problems(Net(), {**rules, "fine": {"match": "head.*", "lr": 1}})
    assert [one.split(":")[0] for one in found] == [f"param_groups.r{i}" for i in range(3)]


def test_lr_and_lr_scale_may_not_meet_on_a_parameter() -> None:
    one, two = {"match": "head.*", "lr": 0.1}, {"ndim": 1, "lr_scale": 2.0}
    for rules in ({"one": one, "two": two}, {"two": two, "one": one}):
        (problem,) = problems(Net(), rules)
        assert problem.startswith("param_groups.one.lr: ")
        assert "'two'" in problem
        assert "head.bias" in problem
    apart = built(Net(), {"one": {**one, "ndim": 2}, "two": two})
    assert len(apart.param_groups) == 3


def test_amsgrad_may_not_meet_8_bits() -> None:
    rules: Rules = {
        "narrow": {"ndim": 2, "optim_bits": 8},
        "more": {"match": "head.*", "amsgrad": True},
    }
    (problem,) = problems(Net(), rules)
    assert problem.startswith("param_groups[narrow+more].amsgrad: ")


def test_a_group_states_no_rules() -> None:
    model = Net()
    for rules in ({}, {"one": {"ndim": 1, "lr": 1}}):
        for stated in ({"param_groups": {}}, {"lr_scale": 2.0}, {"match": "*"}):
            found = problems([{"params": model, **stated}], rules)
            assert all(f".{next(iter(stated))}: unknown key" in one for one in found)
            assert found
    optimizer = built(model.blocks, {})
    with pytest.raises(ConfigError, match="param_groups: unknown key"):
        optimizer.add_param_group({"params": model.head, "param_groups": {}})
    assert len(optimizer.param_groups) == 1


def test_nothing_is_changed_where_rules_are_refused() -> None:
    model = Net()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    group = {"params": model.named_parameters(), "lr": 0.1}
    with pytest.raises(ConfigError):
        built([group], {"mine": {"match": "gone", "lr_scale": 2.0}})
    assert set(group) == {"params", "lr"}
    assert group["lr"] == 0.1
    assert names_of(model) == list(before)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    build_optimizer("adamw", model)


def test_problems_of_rules_and_of_parameters_do_not_hide_each_other() -> None:
    message = str(refusal([{"params": Net(), "epss": 1}], {"mine": {"match": "gone", "lr": 1}}))
    assert "param_groups.mine: matches no parameter" in message
    assert "epss: unknown key" in message


def test_bad_parameters_are_refused_before_rules_are_read() -> None:
    model = nn.Linear(2, 2, dtype=torch.float64)
    message = str(refusal(model, {"mine": {"match": "gone", "lr": 1}}))
    assert "weight: has dtype torch.float64" in message
