"""Configs with rules: plain values that can be stored, compared and resolved again."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf
from pydantic import ValidationError

from optfactory import resolve
from optfactory.config.group_rules import GroupRule
from tests.families import NAMES, NAMES_OF_FIRST, has, takes
from tests.param_groups.harness import Net, Rules, built, got

RULES: Rules = {
    "head": {"match": "head.*", "lr_scale": "2.5", "betas": [0.5, 0.75]},
    "norms": {"modules": ["LayerNorm", "*BatchNorm*"], "weight_decay": 0.0, "optional": True},
    "expressions": {"regex": [r"^embed", "bias$"], "ndim": "<= 1", "eps": "1e-6", "lr": 0.25},
    "exact": {"ndim": 1, "listed_by": "no_weight_decay", "weight_decay": 0, "optional": True},
    "layers": {"layer_decay": 0.75, "blocks": "*blocks", "skip_zeros": False},
    "wide": {"match": ["embed.*"], "optim_bits": 32, "is_paged": False, "min_8bit_size": 1},
}


def rules_of(name: str) -> Rules:
    """The rules, without hyperparameters that an optimizer does not have."""
    return {
        label: {
            k: value for k, value in rule.items() if not has("adam", k) or takes(name, k, value)
        }
        for label, rule in RULES.items()
    }


def test_the_first_families_have_all_hyperparameters_of_the_rules() -> None:
    assert all(rules_of(name) == RULES for name in NAMES_OF_FIRST)


@pytest.mark.parametrize("name", NAMES)
def test_a_dump_resolves_to_the_same_config(name: str) -> None:
    config = resolve(name, param_groups=rules_of(name), lr=0.5)
    dump = config.model_dump(mode="json")
    assert list(dump["param_groups"]) == list(RULES)
    for text in (json.dumps(dump), config.model_dump_json()):
        again = resolve(json.loads(text))
        assert again == config
        assert again.model_dump(mode="json") == dump
    assert resolve(yaml.safe_load(yaml.safe_dump(dump))) == config
    assert resolve(OmegaConf.create(dump)) == config
    assert resolve(config.model_dump()) == config


def test_a_dump_holds_what_was_stated_and_nothing_else() -> None:
    dump = resolve("adamw", param_groups=RULES).model_dump(mode="json")["param_groups"]
    assert dump["head"] == {"match": "head.*", "lr_scale": 2.5, "betas": [0.5, 0.75]}
    assert dump["exact"]["ndim"] == "==1"
    assert dump["expressions"]["regex"] == ["^embed", "bias$"]
    assert dump["wide"] == {
        "match": "embed.*",
        "optim_bits": 32,
        "is_paged": False,
        "min_8bit_size": 1,
    }
    assert dump["layers"]["skip_zeros"] is False


@pytest.mark.parametrize("way", [lambda c: pickle.loads(pickle.dumps(c)), copy.copy, copy.deepcopy])
def test_configs_with_rules_are_copied_hashed_and_compared(way: Any) -> None:
    config = resolve("adamw8bit", param_groups=RULES)
    other = way(config)
    assert other == config
    assert hash(other) == hash(config)
    assert {config: 1}[other] == 1
    assert list(other.param_groups) == list(RULES)
    assert resolve(other) == config


def test_another_process_unpickles_a_config_with_rules() -> None:
    code = "import pickle, sys; c = pickle.load(sys.stdin.buffer); print(c.param_groups['head'].lr)"
    rules = {"head": {"match": "head.*", "lr": 0.125}}
    data = pickle.dumps(resolve("paged_adamw8bit", param_groups=rules))
    run = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, check=True)
    assert float(run.stdout) == 0.125


@pytest.mark.parametrize(
    "change",
    [
        {"head": {"match": "head.*", "lr_scale": 2.5, "betas": [0.5, 0.5]}},
        {"head": {"match": "head", "lr_scale": 2.5, "betas": [0.5, 0.75]}},
        {"head": None},
        {"more": {"match": "*", "lr": 1}},
    ],
)
def test_configs_with_other_rules_are_not_equal(change: Rules) -> None:
    config = resolve("adamw", param_groups=RULES)
    other = resolve("adamw", param_groups={**RULES, **change})
    assert other != config
    assert resolve("adamw") != config


@pytest.mark.parametrize("name", NAMES)
def test_another_name_keeps_the_rules(name: str) -> None:
    config = resolve("adamw8bit", param_groups=rules_of(name), lr=0.5)
    other = resolve(config, name=name)
    assert (other.name, other.lr) == (name, 0.5)
    assert other.model_dump()["param_groups"] == config.model_dump()["param_groups"]
    assert resolve(other, name="adamw8bit") == config


def test_overrides_replace_all_rules() -> None:
    config = resolve("adamw", param_groups=RULES)
    other = resolve(config, param_groups={"one": {"ndim": 1, "lr": 1}})
    assert list(other.model_dump()["param_groups"]) == ["one"]
    for empty in ({}, None):
        assert resolve(config, param_groups=empty) == resolve("adamw")


def test_rules_are_frozen_and_their_order_is_kept() -> None:
    config = resolve("adamw", param_groups=RULES)
    rule = config.param_groups["head"]
    with pytest.raises(ValidationError):
        rule.lr_scale = 3.0
    with pytest.raises(ValidationError):
        config.param_groups = {}
    backwards = resolve("adamw", param_groups=dict(reversed(RULES.items())))
    assert list(backwards.model_dump()["param_groups"]) == list(reversed(RULES))


def test_rules_may_be_given_as_objects() -> None:
    rules = {"head": GroupRule(match="head.*", lr=0.5), "rest": {"match": "embed.*", "lr": 0.25}}
    config = resolve("adamw", param_groups=rules)
    plain = {"head": {"match": "head.*", "lr": 0.5}, "rest": rules["rest"]}
    assert config == resolve("adamw", param_groups=plain)
    assert got(built(Net(), rules), "lr")["head.bias"] == 0.5


@pytest.mark.parametrize("nested", [False, True])
def test_rules_may_be_omegaconf_nodes(nested: bool) -> None:
    plain: Rules = {"a": {"match": ["head.*", "embed.*"], "lr": 0.5, "betas": [0.5, 0.5]}}
    node = OmegaConf.create({"rate": 0.5, "rules": {"a": {**plain["a"], "lr": "${rate}"}}}).rules
    rules = {"a": node.a} if nested else node
    assert got(built(Net(), rules), "lr") == got(built(Net(), plain), "lr")
    assert got(built(Net(), rules), "betas") == got(built(Net(), plain), "betas")


def test_defaults_are_not_shared() -> None:
    one, other = resolve("adamw"), resolve("adamw")
    assert one.model_dump()["param_groups"] == {}
    assert one.param_groups is not other.param_groups
