"""Names, values and groups at the edge of what rules allow."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from optfactory import resolve
from optfactory.errors import ConfigError, StateError
from optfactory.groups.layers import LayerNumbers
from tests.param_groups.harness import Net, built, got, marked
from tests.param_groups.test_layers import numbers


class Alias(nn.Module):
    """One parameter under two names in one module."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Parameter(torch.ones(2, 2))
        self.head = self.embed


class DistributedDataParallel(nn.Module):
    """What the class of that name does to names."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


# ---- layers ----------------------------------------------------------------------------------


def test_names_that_end_in_a_digit_are_no_blocks() -> None:
    names = [("emb2.weight", 9000), ("layers.0.w", 1), ("layers.1.w", 1), ("head.w", 1)]
    assert numbers(names) == [0, 1, 2, 3]
    assert LayerNumbers([("fc1.weight", 4), ("fc2.weight", 4)]).lists == []


def test_the_root_is_the_outermost_list() -> None:
    assert numbers(["0.0.w", "0.1.w", "1.0.w"]) == [1, 1, 2]


def test_lists_directly_inside_lists() -> None:
    names = ["stages.0.0.w", "stages.0.1.w", "stages.1.0.w", "head.w"]
    assert numbers(names, "stages.*") == [1, 2, 3, 4]


def test_groups_of_modules_with_equal_names_keep_their_order() -> None:
    net = Net()
    groups = [{"params": part} for part in (net.embed, net.blocks, net.norm, net.head)]
    optimizer = built(groups, {"l": {"layer_decay": 0.5}}, lr=1.0)
    names = {id(p): name for name, p in net.named_parameters()}
    rates = {names[id(p)]: g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert rates["embed.weight"] == 0.125
    assert rates["head.weight"] == 1.0


# ---- learning rates --------------------------------------------------------------------------


def test_a_rules_lr_beats_a_tensor_lr_of_the_config() -> None:
    rates = got(built(Net(), {"h": {"match": "head.*", "lr": 0.5}}, lr=torch.tensor(0.1)), "lr")
    assert rates["head.weight"] == 0.5


def test_each_group_has_a_tensor_of_its_own() -> None:
    optimizer = built(Net(), {"n": {"ndim": 1, "weight_decay": 0.0}}, lr=torch.tensor(0.1))
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.1)
    schedule.step(1.0)
    schedule.step(2.0)
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    assert rates == pytest.approx([0.01, 0.01])


@pytest.mark.parametrize("lr", [True, torch.tensor(True)])
def test_a_boolean_lr_of_a_group_is_refused_when_it_is_scaled(lr: Any) -> None:
    with pytest.raises(ConfigError):
        built([{"params": Net(), "lr": lr}], {"h": {"match": "*", "lr_scale": 2}})


# ---- matching --------------------------------------------------------------------------------


def test_two_names_in_one_module() -> None:
    assert marked(Alias(), {"match": "head"}) == {"embed"}


@pytest.mark.parametrize("method", ["", "forward", "head"])
def test_listed_by_something_else(method: str) -> None:
    with pytest.raises(ConfigError, match="listed_by"):
        marked(Net(), {"listed_by": method})


def test_compiled_parallel_models_have_plain_names() -> None:
    model = torch.compile(DistributedDataParallel(Net()), backend="eager")
    assert marked(model, {"match": "head.*"}) == {"head.weight", "head.bias"}


def test_a_parametrized_weight_belongs_to_its_module() -> None:
    model = nn.ModuleDict({"one": nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))})
    optimizer = built(model, {"l": {"modules": "Linear", "weight_decay": 0.5}})
    assert [len(group["params"]) for group in optimizer.param_groups] == [3]


def test_a_model_that_contains_its_parent() -> None:
    net = Net()
    net.head.above = net
    assert "head.weight" in got(built(net, {"h": {"match": "head.*", "lr": 0.5}}), "lr")


def test_names_that_a_group_states() -> None:
    net = Net()
    pairs = list(net.named_parameters())
    group = {"params": [p for _, p in pairs], "param_names": [name for name, _ in pairs]}
    assert got(built([group], {"h": {"match": "head.*", "lr": 0.5}}), "lr")["head.weight"] == 0.5


def test_digits_of_other_scripts_are_no_number() -> None:
    with pytest.raises(ConfigError):
        marked(Net(), {"ndim": "\u0662"})


# ---- configs ---------------------------------------------------------------------------------


def test_dumps_round_trip_with_tuples() -> None:
    config = resolve("adamw", param_groups={"a": {"match": "*", "betas": (0.9, 0.95)}})
    assert resolve(config.model_dump(mode="json")) == config


@pytest.mark.parametrize("lr", [torch.tensor(0.5), np.float32(0.5), "5e-1"])
def test_dumps_hold_plain_numbers(lr: Any) -> None:
    config = resolve("adamw", param_groups={"a": {"match": "*", "lr": lr}})
    assert json.loads(config.model_dump_json())["param_groups"]["a"]["lr"] == 0.5
    assert config == resolve("adamw", param_groups={"a": {"match": "*", "lr": 0.5}})


def test_rules_as_nodes_of_omegaconf() -> None:
    rules = OmegaConf.create({"a": {"match": "*", "betas": [0.5, 0.5]}})
    json.loads(resolve("adamw", param_groups=rules).model_dump_json())
    missing = OmegaConf.create({"name": "adamw", "param_groups": {"a": {"match": "???", "lr": 1}}})
    with pytest.raises(ConfigError, match=r"param_groups\.a\.match: a value is missing"):
        resolve(missing)


@pytest.mark.parametrize(
    ("config", "rule"),
    [
        ({"name": "adamw8bit", "signed_map": "symmetric"}, {"optim_bits": 32}),
        ({"name": "adamw8bit", "block_wise": False}, {"optim_bits": 32}),
        ({"name": "paged_adamw", "page_dir": "."}, {"is_paged": False}),
        ({"name": "paged_adamw", "page_memory": "pinned"}, {"is_paged": False}),
    ],
)
def test_a_group_without_8_bits_or_paging_has_none_of_their_options(
    config: dict[str, Any], rule: dict[str, Any]
) -> None:
    resolve(config, param_groups={"a": {"match": "*", **rule}})


# ---- errors ----------------------------------------------------------------------------------


def problems(config: dict[str, Any]) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as error:
        built(Net(), config.pop("param_groups"), **config)
    return error.value.problems


def test_the_same_problem_in_config_and_rule_is_told_twice() -> None:
    assert len(problems({"lr": -1, "param_groups": {"a": {"match": "*", "lr": -2}}})) == 2


def test_rules_that_match_nothing_are_told_beside_others() -> None:
    rules = {"a": {"listed_by": "nope", "lr": 1}, "b": {"match": "gone", "lr": 1}}
    assert len(problems({"param_groups": rules})) == 2


def test_rules_in_a_rule() -> None:
    (problem,) = problems({"param_groups": {"a": {"match": "*", "param_groups": {}}}})
    assert "rules belong to the optimizer's config" in problem


# ---- checkpoints -----------------------------------------------------------------------------


def test_parameters_in_other_groups_than_in_the_checkpoint_are_refused() -> None:
    def made(*matched: str) -> Any:
        model = nn.ModuleDict({key: nn.Linear(3, 3, bias=False) for key in "qkvo"})
        optimizer = built(model, {"r": {"match": list(matched), "lr": 0.5}})
        for number, p in enumerate(model.parameters()):
            p.grad = torch.full_like(p, number + 1.0)
        optimizer.step()
        return optimizer

    saved, other = made("q.*", "v.*"), made("q.*", "k.*")
    before = other.state_dict()
    with pytest.raises(StateError, match=r"v\.weight here, and this optimizer in another group"):
        other.load_state_dict(saved.state_dict())
    assert str(other.state_dict()) == str(before)
