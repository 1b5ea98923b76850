"""A plan's groups, rules without effect, and every form in which parameters may come."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from optfactory import build_optimizer, plan, ready_rules, resolve
from optfactory.errors import ConfigError, UnknownOptimizerError
from optfactory.planning.memory_plan import MemoryPlan
from tests.planning.harness import RULES, Odd, Tied, on_meta

GROUPING: dict[str, dict[str, Any]] = {
    **RULES,
    "overlapping": {
        "no_decay": {"ndim": "<=1", "weight_decay": 0.0},
        "norms": {"modules": "*Norm*", "lr_scale": 2.0},
        "embedding": {"modules": "Embedding", "optim_bits": 32, "betas": [0.5, 0.9]},
    },
}


@pytest.mark.parametrize("name", ["adamw8bit", "paged_lamb"])
@pytest.mark.parametrize("rules", GROUPING.values(), ids=GROUPING)
def test_groups_are_those_of_the_optimizer(name: str, rules: dict[str, Any]) -> None:
    planned = plan(name, on_meta(Odd), lr=0.25, param_groups=rules)
    optimizer = build_optimizer(name, Odd(), lr=0.25, param_groups=rules)
    assert [group.name for group in planned.groups] == [
        group["name"] for group in optimizer.param_groups
    ]
    for group, real in zip(planned.groups, optimizer.param_groups, strict=True):
        assert list(group.parameters) == real["param_names"]
        assert group.elements == sum(p.numel() for p in real["params"])
        whole = resolve(name, lr=0.25).model_dump(exclude={"name", "param_groups"})
        assert group.overrides == {k: real[k] for k in whole if real[k] != whole[k]}
    assert any(group.overrides for group in planned.groups)


def test_groups_without_rules_are_numbered() -> None:
    model = on_meta(Tied)
    groups = [{"params": [model.embed.weight], "lr": 0.5}, {"params": model.norm.parameters()}]
    planned = plan("adam", groups)
    assert [(g.name, dict(g.overrides)) for g in planned.groups] == [("0", {"lr": 0.5}), ("1", {})]
    assert planned.groups[1].parameters == (
        "param_groups[1].params[0]",
        "param_groups[1].params[1]",
    )
    assert [plan("adam", model).groups[0].name, len(plan("adam", model).groups)] == ["0", 1]


def test_rules_that_match_nothing_are_listed_and_building_refuses_them() -> None:
    rules = {
        "typo": {"match": "embd.*", "optim_bits": 32},
        "class": {"modules": "RMSNorm", "lr_scale": 2},
        "maybe": {"match": "lm_head.*", "lr_scale": 2, "optional": True},
        "cold": {"match": "frozen.*", "lr_scale": 2},
        "used": {"ndim": "<=1", "weight_decay": 0},
    }
    planned = plan("adam8bit", on_meta(Tied), param_groups=rules)
    assert set(planned.unmatched) == {"typo", "class"}
    assert set(planned.idle) == {"maybe", "cold"}
    assert "not trained" in planned.idle["cold"]
    assert "optional" in planned.idle["maybe"]
    with pytest.raises(ConfigError) as caught:
        build_optimizer("adam8bit", Tied(), param_groups=rules)
    assert caught.value.problems == tuple(planned.unmatched.values())
    for text in (*planned.unmatched.values(), "param_groups.cold: ", "param_groups.maybe: "):
        assert text in str(planned)
    assert "embed.weight" in planned.unmatched["typo"]
    assert "BatchNorm1d" in planned.unmatched["class"]
    dictionary = planned.as_dict()
    assert dictionary["unmatched"] == planned.unmatched
    assert dictionary["idle"] == planned.idle


def test_rules_that_all_match_leave_nothing_to_say() -> None:
    planned = plan("adam8bit", on_meta(Tied), param_groups=ready_rules("no_decay_1d"))
    assert (planned.unmatched, planned.idle) == ({}, {})


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("adam8bit", {"lrr": 1}, "did you mean 'lr'"),
        ("adam8bit", {"amsgrad": True}, "amsgrad needs 32-bit state"),
        ("adam8bit", {"param_groups": {"a": {"match": "*", "bits": 8}}}, "did you mean"),
        ("adam8bit", {"param_groups": {"a": {"match": "*", "amsgrad": True}}}, "amsgrad"),
        ("paged_adam", {"page_dir": "/no/such/folder"}, "page_dir"),
        ("adam", {"param_rounding": "kahan"}, "16-bit parameters"),
    ],
)
def test_what_building_refuses_a_plan_refuses_too(
    name: str, overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as planned:
        plan(name, on_meta(Odd), **overrides)
    with pytest.raises(ConfigError) as built:
        build_optimizer(name, Odd(), **overrides)
    assert str(planned.value) == str(built.value)


def test_names_are_needed_by_rules_that_match_them() -> None:
    rules = {"a": {"match": "x", "lr_scale": 2.0}}
    with pytest.raises(ConfigError, match="the parameters have no names"):
        plan("adam", on_meta(Odd).parameters(), param_groups=rules)
    assert plan("adam", on_meta(Odd).named_parameters(), param_groups=rules).unmatched


@pytest.mark.parametrize(
    "params", [[], iter([]), 3, "model", torch.ones(3), {"params": []}, [torch.ones(2).long()], [1]]
)
def test_what_are_no_parameters_is_refused(params: Any) -> None:
    with pytest.raises(ConfigError):
        plan("adam", params)


def test_an_unknown_name_gets_a_suggestion() -> None:
    with pytest.raises(UnknownOptimizerError, match="Did you mean 'adam8bit'"):
        plan("adm8bit", on_meta(Odd))


# ---- forms of parameters ----------------------------------------------------------------------


def generators(model: nn.Module) -> Iterator[dict[str, Any]]:
    for child in (model.wide, model.embed, model.body):
        yield {"params": (p for p in child.parameters()), "lr": 0.5}


FORMS: dict[str, Callable[[nn.Module], Any]] = {
    "module": lambda model: model,
    "generator": lambda model: model.parameters(),
    "list": lambda model: list(model.parameters()),
    "values": lambda model: dict(model.named_parameters()).values(),
    "filter": lambda model: filter(lambda p: p.requires_grad, model.parameters()),
    "pairs": lambda model: model.named_parameters(),
    "list_of_pairs": lambda model: list(model.named_parameters()),
    "items": lambda model: dict(model.named_parameters()).items(),
    "map": lambda model: map(tuple, model.named_parameters()),
    "chain": lambda model: itertools.chain(model.wide.parameters(), model.embed.parameters()),
    "groups": lambda model: [{"params": model.wide.parameters()}, {"params": [model.flat]}],
    "one_tensor": lambda model: [{"params": model.flat, "optim_bits": 32}],
    "a_module": lambda model: [{"params": model.wide}, {"params": model.embed, "lr": 0.5}],
    "groups_of_pairs": lambda model: [{"params": model.wide.named_parameters()}],
    "tuple": lambda model: tuple({"params": child.parameters()} for child in (model.wide,)),
    "generators": generators,
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_form_of_parameters_is_planned_as_it_is_built(form: Callable[[Any], Any]) -> None:
    def check(planned: MemoryPlan) -> None:
        optimizer = build_optimizer("paged_adamw8bit", form(Odd()))
        assert planned.report == optimizer.memory_report()
        assert len(planned.groups) == len(optimizer.param_groups)
        sizes = {other.name: other.state_bytes for other in planned.alternatives}
        for name in ("adam", "paged_adamw8bit", "lamb8bit"):  # the parameters are read again
            report = build_optimizer(name, form(Odd())).memory_report()
            assert sizes[name] == report.state_bytes

    check(plan("paged_adamw8bit", form(Odd())))
    check(plan("paged_adamw8bit", form(on_meta(Odd))))


def test_nothing_of_the_callers_is_changed() -> None:
    model = Odd()
    rules = {"a": {"match": "wide.*", "lr_scale": 2.0}}
    group = {"params": list(model.named_parameters())}
    groups = [group]
    before = {name: (p, p.requires_grad, p.device) for name, p in model.named_parameters()}
    plan("adam8bit", groups, device="cuda", memory="1GiB", param_groups=rules)
    assert groups == [group]
    assert list(group) == ["params"]
    assert rules == {"a": {"match": "wide.*", "lr_scale": 2.0}}
    assert before == {name: (p, p.requires_grad, p.device) for name, p in model.named_parameters()}
    assert all(p.grad is None for p in model.parameters())
