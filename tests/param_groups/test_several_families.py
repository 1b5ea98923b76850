"""Rules and groups that name an optimizer: one Optimizer2State with several families."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from optfactory import Optimizer2State, build_optimizer, get_optimizer_info, plan, resolve
from optfactory.catalog.files import render
from optfactory.errors import ConfigError, StateError
from tests.families import FAMILIES, known_to
from tests.param_groups.harness import Net, built, copy_of, give_gradients, got, problems

WIDE = 64
NEAREST = {"state_rounding": "nearest"}  # what is rounded at random depends on a tensor's number
HEAD = {"match": "head.*", "optimizer": "lion8bit"}


class Wide(Net):
    """Large enough for 8-bit state."""

    def __init__(self) -> None:
        super().__init__(width=WIDE)


def trained(optimizer: torch.optim.Optimizer, model: torch.nn.Module, steps: range) -> None:
    for step in steps:
        give_gradients(model, step)
        optimizer.step()


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


# ---- what a group gets ------------------------------------------------------------------------


def test_defaults_are_the_names_and_how_far_it_goes_the_configs() -> None:
    optimizer = built(
        Net(), {"head": HEAD}, "adam", lr=0.5, weight_decay=0.25, betas=(0.5, 0.6), maximize=True
    )
    (group,) = [g for g in optimizer.param_groups if g["name"] == "head"]
    expected = get_optimizer_info("lion8bit").defaults
    expected |= {"lr": 0.5, "weight_decay": 0.25, "maximize": True, "optimizer": "lion8bit"}
    beside = {"params", "param_names", "name", "format_version"}
    assert {key: value for key, value in group.items() if key not in beside} == expected
    assert set(got(optimizer, "optimizer").values()) == {"adam", "lion8bit"}


def test_a_rule_states_fields_of_its_family_and_a_rate() -> None:
    rule = {**HEAD, "betas": [0.5, 0.75], "lr": 0.125, "weight_decay": 0.0}
    optimizer = built(Net(), {"head": rule}, lr=0.5)
    assert got(optimizer, "betas")["head.weight"] == (0.5, 0.75)
    assert got(optimizer, "lr")["head.weight"] == 0.125
    assert got(optimizer, "weight_decay")["head.weight"] == 0.0


def test_rules_before_it_leave_rate_and_decay_and_rules_behind_it_override() -> None:
    rules = {
        "all": {"match": "*", "betas": [0.1, 0.2], "weight_decay": 0.5, "skip_zeros": True},
        "head": {**HEAD, "optim_bits": 8},
        "vectors": {"ndim": 1, "optim_bits": 32, "weight_decay": 0.0},
    }
    optimizer = built(Net(), rules)
    assert got(optimizer, "betas")["head.weight"] == (0.9, 0.99)  # Lion's
    assert got(optimizer, "weight_decay")["head.weight"] == 0.5
    assert got(optimizer, "optim_bits")["head.weight"] == 8
    assert got(optimizer, "skip_zeros")["head.weight"] is False
    assert got(optimizer, "optim_bits")["head.bias"] == 32
    assert got(optimizer, "weight_decay")["head.bias"] == 0.0
    assert got(optimizer, "optimizer")["head.bias"] == "lion8bit"


def test_a_group_of_the_users_names_its_optimizer() -> None:
    net = Net()
    groups: list[dict[str, Any]] = [
        {"params": net.embed.parameters(), "optimizer": "SGD", "momentum": 0.5},
        {"params": net.head.parameters()},
    ]
    optimizer = build_optimizer("adamw8bit", groups, lr=0.25)
    assert [group["optimizer"] for group in optimizer.param_groups] == ["sgd", "adamw8bit"]
    assert optimizer.param_groups[0]["momentum"] == 0.5
    assert "betas" not in optimizer.param_groups[0]
    optimizer.add_param_group({"params": net.norm.parameters(), "optimizer": "lion"})
    assert optimizer.param_groups[2]["optimizer"] == "lion"
    assert optimizer.param_groups[2]["lr"] == 0.25
    assert "eps" not in optimizer.param_groups[2]
    extra = {"params": net.blocks.parameters(), "optimizer": "lion8bit", "optim_bits": 32}
    with pytest.raises(ConfigError, match="contradicts the name 'lion8bit'"):
        optimizer.add_param_group(extra)
    assert len(optimizer.param_groups) == 3


def test_a_users_group_begins_anew_within_rules() -> None:
    net = Net()
    groups = [
        {"params": [("head", net.head.weight)], "optimizer": "adam", "eps": 0.5},
        {"params": [("embed", net.embed.weight)]},
    ]
    rules = {"all": {"match": "*", "optimizer": "lion", "betas": [0.5, 0.5], "lr": 0.75}}
    optimizer = built(groups, rules, "sgd")
    assert got(optimizer, "optimizer")["head"] == "adam"
    assert got(optimizer, "betas")["head"] == (0.9, 0.999)
    assert got(optimizer, "lr")["head"] == 0.75
    assert got(optimizer, "optimizer")["embed"] == "lion"


def test_groups_of_a_mixed_optimizer_keep_their_families() -> None:
    old = built(Net(), {"head": {**HEAD, "betas": [0.5, 0.5]}}, "adamw")
    new = build_optimizer("adamw", old.param_groups)
    assert [g["optimizer"] for g in new.param_groups] == ["adamw", "lion"]
    assert got(new, "optim_bits") == got(old, "optim_bits")
    assert got(new, "betas") == got(old, "betas")


# ---- training ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("width", ["8bit", "32bit"])
def test_every_group_trains_as_with_an_optimizer_of_its_own(family: str, width: str) -> None:
    name = family + width
    more = NEAREST if width == "8bit" else {}
    mixed, parted = Wide(), Wide()
    parted.load_state_dict(mixed.state_dict())
    rule = {"match": "head.weight", "optimizer": name, **more}
    one = built(mixed, {"head": rule}, "adamw8bit", lr=1e-2)
    shared = known_to(name, {"weight_decay": 0.01})
    weights = [("a matrix", parted.head.weight)]
    head = build_optimizer(name, weights, lr=1e-2, **shared, **more)
    rest = [p for key, p in parted.named_parameters() if key != "head.weight"]
    others = build_optimizer("adamw8bit", rest, lr=1e-2)
    for step in range(3):
        give_gradients(mixed, step)
        give_gradients(parted, step)
        for optimizer in (one, head, others):
            optimizer.step()
        assert same(mixed, parted)
    assert one.state[mixed.head.weight].keys() == head.state[parted.head.weight].keys()


def test_families_of_one_rule_share_a_kernel_call() -> None:
    net = Wide()
    optimizer = built(net, {"head": {**HEAD, "optimizer": "adam"}}, "adamw", weight_decay=0.1)
    trained(optimizer, net, range(2))
    plan_ = optimizer._plan
    assert plan_ is not None
    assert len(plan_.gather()) == 1
    assert got(optimizer, "adam_w_mode")["head.weight"] is False
    assert got(optimizer, "adam_w_mode")["norm.weight"] is True


def test_rates_keep_their_ratio_under_a_schedule() -> None:
    net = Net()
    optimizer = built(net, {"head": {**HEAD, "lr_scale": 0.25}}, lr=0.5)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    trained(optimizer, net, range(1))
    schedule.step()
    rates = got(optimizer, "lr")
    assert (rates["norm.weight"], rates["head.weight"]) == (0.25, 0.0625)


def test_copies_and_pickles_go_on() -> None:
    net = Wide()
    optimizer = built(net, {"head": HEAD}, "adamw8bit")
    trained(optimizer, net, range(2))
    other, theirs = pickle.loads(pickle.dumps((net, optimizer)))
    third, thirds = copy.deepcopy((net, optimizer))
    for model, its in ((net, optimizer), (other, theirs), (third, thirds)):
        trained(its, model, range(2, 4))
    assert same(net, other)
    assert same(net, third)


def test_a_groups_optimizer_cannot_be_changed() -> None:
    net = Wide()
    optimizer = built(net, {"head": HEAD}, "adamw8bit")
    trained(optimizer, net, range(1))
    for name in ("paged_lion8bit", "adamw8bit", "nothing"):
        optimizer.param_groups[-1]["optimizer"] = name
        give_gradients(net, 1)
        with pytest.raises(ConfigError, match="param_groups"):
            optimizer.step()
    optimizer.param_groups[-1]["optimizer"] = "lion8bit"
    optimizer.step()


# ---- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "place", "text"),
    [
        ({"eps": 1e-8}, "head.eps", "`optfactory show lion8bit`"),
        ({"optim_bits": 32}, "head.optim_bits", "contradicts the name 'lion8bit'"),
        ({"is_paged": True, "optimizer": "lion"}, "", ""),
        ({"optimizer": "lyon"}, "head.optimizer", "unknown optimizer 'lyon'"),
        ({"optimizer": 8}, "head.optimizer", "valid string"),
        ({"betas": [0.9]}, "head.betas", ""),
        ({"name": "lion"}, "head.name", "optimizer: lion"),
    ],
)
def test_a_rule_is_checked_by_its_own_family(rule: dict[str, Any], place: str, text: str) -> None:
    rules = {"head": {**HEAD, **rule}}
    if not place:
        resolve("adamw8bit", param_groups=rules)
        return
    found = problems(Net(), rules)
    assert any(f"param_groups.{place}" in line and text in line for line in found), found


def test_what_rules_make_together_names_them() -> None:
    rules = {"head": HEAD, "exact": {"match": "head.*", "eps": 1e-6}}
    (problem,) = problems(Net(), rules)
    assert problem.startswith("param_groups[head+exact].eps: unknown key")


def test_a_users_group_is_refused_by_its_number() -> None:
    for wrong, text in (
        ({"eps": 1e-8}, "param_groups[0].eps: unknown key; `optfactory show lion`"),
        ({"optim_bits": 32}, "param_groups[0].optim_bits: 32 contradicts the name 'lion8bit'"),
        ({"optimizer": "lyon"}, "param_groups[0].optimizer: unknown optimizer 'lyon'"),
    ):
        group = {"params": Net().parameters(), "optimizer": "lion8bit", **wrong}
        with pytest.raises(ConfigError) as caught:
            build_optimizer("adamw8bit", [group])
        assert caught.value.problems[0].startswith(text)


# ---- configs ----------------------------------------------------------------------------------


def test_a_config_comes_back_from_every_form(tmp_path: Path) -> None:
    config = resolve("adamw8bit", param_groups={"head": {**HEAD, "optimizer": "Lion_8bit"}})
    (rule,) = config.param_groups.values()  # type: ignore[attr-defined]
    assert rule.optimizer == "lion8bit"
    assert resolve(config.model_dump(mode="json")) == config
    file = tmp_path / "one.yaml"
    file.write_text(render(config))
    assert resolve(OmegaConf.create(file.read_text())) == config


def test_a_spelling_of_bitsandbytes_means_its_rule_here_too() -> None:
    rules = {"head": {**HEAD, "optimizer": "bnb_adam8bit"}}
    assert got(built(Net(), rules), "adam_w_mode")["head.weight"] is True
    again = resolve(resolve("lion", param_groups=rules).model_dump())
    assert build_optimizer(again, Net()).param_groups[-1]["adam_w_mode"] is True
    group = {"params": Net().parameters(), "optimizer": "adam_bnb_8bit"}
    assert build_optimizer("lion", [group]).param_groups[0]["adam_w_mode"] is True


def test_hydra_gives_a_rule_another_optimizer(tmp_path: Path) -> None:
    from hydra import compose, initialize_config_dir

    (tmp_path / "config.yaml").write_text(
        "hydra: {searchpath: ['pkg://optfactory.configs']}\n"
        "defaults: [{optimizer: adamw8bit}, _self_]\n"
        "optimizer: {param_groups: {head: {match: 'head.*', optimizer: lion}}}\n"
    )
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        cfg = compose("config", ["optimizer.param_groups.head.optimizer=sgd8bit"])
        added = compose("config", ["+optimizer.param_groups.head.betas=[0.5,0.5]"])
    assert got(build_optimizer(cfg.optimizer, Net()), "optimizer")["head.bias"] == "sgd8bit"
    assert got(build_optimizer(added.optimizer, Net()), "betas")["head.bias"] == (0.5, 0.5)


def test_the_plan_says_which_optimizer_a_group_has_and_its_bytes() -> None:
    net = Wide()
    rules = {"head": {**HEAD, "betas": [0.5, 0.5]}}
    planned = plan("adamw8bit", net, param_groups=rules)
    shown = {group.name: group.overrides for group in planned.groups}
    assert shown["head"] == {"optimizer": "lion8bit", "betas": (0.5, 0.5)}
    assert shown["default"] == {}
    assert "optimizer: lion8bit" in str(planned)
    optimizer = built(net, rules, "adamw8bit")
    report = optimizer.memory_report()
    assert planned.report.state_bytes == report.state_bytes
    trained(optimizer, net, range(1))
    real = sum(t.nbytes for entries in optimizer.state.values() for t in entries.values())
    assert report.state_bytes == real


# ---- checkpoints ------------------------------------------------------------------------------


def mixed(model: torch.nn.Module, name: str = "lion8bit") -> Optimizer2State:
    return built(model, {"head": {**HEAD, "optimizer": name}}, "adamw8bit", lr=1e-2)


def test_a_checkpoint_goes_on_bit_for_bit() -> None:
    net = Wide()
    optimizer = mixed(net)
    trained(optimizer, net, range(2))
    resumed = copy_of(net)
    other = mixed(resumed)
    other.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
    for model, its in ((net, optimizer), (resumed, other)):
        trained(its, model, range(2, 4))
    assert same(net, resumed)


@pytest.mark.parametrize("flat", [False, True])
def test_a_distributed_checkpoint_goes_on_bit_for_bit(flat: bool) -> None:
    net = Wide()
    optimizer = mixed(net)
    trained(optimizer, net, range(2))
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    saved = copy.deepcopy(get_optimizer_state_dict(net, optimizer, options=options))
    resumed = copy_of(net)
    other = mixed(resumed)
    set_optimizer_state_dict(resumed, other, saved, options=options)
    for model, its in ((net, optimizer), (resumed, other)):
        trained(its, model, range(2, 4))
    assert same(net, resumed)


def test_a_groups_family_is_part_of_its_checkpoint() -> None:
    net = Wide()
    optimizer = mixed(net)
    trained(optimizer, net, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    before = copy.deepcopy(optimizer.state_dict())
    for other in (
        built(net, {"head": {"match": "head.*", "lr": 0.1}}, "adamw8bit"),
        mixed(net, "sgd"),
    ):
        with pytest.raises(StateError, match=r"param_groups\[1\]\.optimizer: .*'lion'"):
            other.load_state_dict(saved)
    wider = mixed(net, "lion32bit")
    wider.load_state_dict(saved)
    assert wider.state[net.head.weight].keys() == {"step", "exp_avg"}
    assert str(saved) == str(before)


@pytest.mark.parametrize("layout", ["torch", "bitsandbytes"])
def test_others_have_no_optimizer_of_several_families(layout: str) -> None:
    with pytest.raises(ConfigError, match=r"param_groups\[1\]\.optimizer: .* has no lion"):
        mixed(Wide()).export_state_dict(layout)
