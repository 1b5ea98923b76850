"""Rules for parameters of every form that `build_optimizer` takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.param_groups.harness import Net, Rules, built, got, labels, problems

Form = Callable[[nn.Module], Any]

NAMED: dict[str, Form] = {
    "module": lambda model: model,
    "pairs": lambda model: model.named_parameters(),
    "list of pairs": lambda model: list(model.named_parameters()),
    "group of a module": lambda model: [{"params": model}],
    "group of pairs": lambda model: [{"params": model.named_parameters()}],
    "groups of pairs": lambda model: (
        {"params": [pair]} for pair in list(model.named_parameters())
    ),
}
UNNAMED: dict[str, Form] = {
    "tensors": lambda model: model.parameters(),
    "list of tensors": lambda model: list(model.parameters()),
    "group of tensors": lambda model: [{"params": model.parameters()}],
    "groups of tensors": lambda model: [{"params": p} for p in model.parameters()],
}
ALL = {**NAMED, **UNNAMED}


def by_tensor(model: nn.Module, form: Form, rules: Rules, key: str) -> dict[str, Any]:
    """A hyperparameter of every parameter, by its name in the model."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups = built(form(model), rules).param_groups
    return {names[id(p)]: group[key] for group in groups for p in group["params"]}


@pytest.mark.parametrize("form", ALL.values(), ids=ALL.keys())
def test_dimensions_are_known_of_every_form(form: Form) -> None:
    found = by_tensor(Net(), form, {"one": {"ndim": "<=1", "weight_decay": 0.0}}, "weight_decay")
    assert len(found) == 13
    for name, decay in found.items():
        one = "norm" in name or name.endswith("bias")
        assert decay == (0.0 if one else 0.01), name


@pytest.mark.parametrize("form", NAMED.values(), ids=NAMED.keys())
def test_names_are_known_where_the_caller_gives_them(form: Form) -> None:
    rules: Rules = {
        "head": {"match": "head.*", "lr": 0.5},
        "biases": {"regex": r"\.bias$", "lr": 0.25},
        "layers": {"layer_decay": 0.5},
    }
    rates = by_tensor(Net(), form, rules, "lr")
    assert rates["head.weight"] == 0.5
    assert rates["blocks.1.norm.bias"] == 0.125
    assert rates["embed.weight"] == 0.001 / 8


@pytest.mark.parametrize("form", UNNAMED.values(), ids=UNNAMED.keys())
@pytest.mark.parametrize("key", ["match", "regex", "layer_decay"])
def test_a_rule_that_asks_for_names_needs_them(form: Form, key: str) -> None:
    rule = {"layer_decay": 0.5} if key == "layer_decay" else {key: "head", "lr": 0.5}
    (problem,) = problems(form(Net()), {"mine": rule})
    assert problem.startswith(f"param_groups.mine.{key}: ")
    assert "names" in problem


@pytest.mark.parametrize("form", [*UNNAMED, "pairs", "group of pairs"])
@pytest.mark.parametrize("key", ["modules", "listed_by"])
def test_a_rule_that_asks_for_modules_needs_the_model(form: str, key: str) -> None:
    (problem,) = problems(ALL[form](Net()), {"mine": {key: "Linear", "lr": 0.5}})
    assert problem.startswith(f"param_groups.mine.{key}: ")
    assert "model" in problem


def test_one_group_without_names_is_enough_to_refuse_a_rule_by_name() -> None:
    model = Net()
    groups = [{"params": model.blocks}, {"params": model.head.parameters()}]
    (problem,) = problems(groups, {"mine": {"match": "*", "lr": 0.5}})
    assert problem.startswith("param_groups.mine.match: ")


def test_groups_may_hold_modules() -> None:
    model = Net()
    groups = [
        {"params": model.embed},
        {"params": model.blocks, "weight_decay": 0.5},
        {"params": model.head, "name": "head"},
    ]
    rules: Rules = {
        "norms": {"modules": "LayerNorm", "weight_decay": 0.0, "eps": 1e-3},
        "biases": {"match": "*bias", "lr_scale": 2.0},
    }
    optimizer = built(groups, rules, lr=0.25)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: g for g in optimizer.param_groups for p in g["params"]}
    assert found["embed.weight"]["name"] == "default"
    assert found["blocks.0.norm.bias"]["name"] == "norms+biases"
    assert found["blocks.0.norm.bias"]["weight_decay"] == 0.5
    assert found["blocks.0.norm.bias"]["eps"] == 1e-3
    assert found["blocks.0.norm.bias"]["lr"] == 0.5
    assert found["head.bias"]["name"] == "head+biases"
    assert found["head.weight"]["name"] == "head"


def test_a_module_and_pairs_may_stand_side_by_side() -> None:
    body, head = nn.Linear(3, 3), nn.Linear(3, 2)
    groups = [{"params": body}, {"params": head.named_parameters("head")}]
    optimizer = built(groups, {"linear": {"modules": "Linear", "lr": 0.5}})
    rates = got(optimizer, "lr")
    # What is known by name alone has no module.
    assert rates == {"weight": 0.5, "bias": 0.5, "head.weight": 0.001, "head.bias": 0.001}


def test_unnamed_groups_get_labels_without_names() -> None:
    tensors = [torch.ones(3).requires_grad_(), torch.ones(3, 3).requires_grad_()]
    optimizer = built(tensors, {"one": {"ndim": 1, "lr": 0.5}})
    assert labels(optimizer) == ["one", "default"]
    assert "param_names" not in optimizer.param_groups[0]


def test_a_group_added_later_has_what_it_states() -> None:
    optimizer = built(Net(), {"one": {"ndim": 1, "weight_decay": 0.0}})
    extra = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [("extra", extra)], "lr": 0.5, "name": "late"})
    group = optimizer.param_groups[-1]
    assert (group["name"], group["lr"], group["weight_decay"]) == ("late", 0.5, 0.01)


def test_models_on_the_meta_device_can_be_grouped() -> None:
    with torch.device("meta"):
        model = Net()
    rates = got(built(model, {"layers": {"layer_decay": 0.5}}), "lr")
    assert rates["embed.weight"] == 0.001 / 8
