"""A shipped node lists all values of its name, so that another name alone would get the wrong ones.

Through Hydra's overrides, Python and the command line.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from optfactory import build_optimizer, get_optimizer_info, list_optimizers, resolve
from optfactory.catalog.files import config_folder, shipped_text
from optfactory.catalog.overrides import read_config
from optfactory.errors import ConfigError, UnknownOptimizerError
from tests.unit.harness import refusal

NAMES = list_optimizers()


def composed(choice: str, *overrides: str) -> Any:
    """The node of an app that has nothing but the shipped group."""
    with initialize_config_dir(config_dir=str(config_folder().parent), version_base="1.3"):
        return compose(overrides=[f"+optimizer={choice}", *overrides]).optimizer


@pytest.mark.parametrize(
    ("choice", "name"),
    [
        ("paged_adam8bit", "adamw8bit"),  # would keep L2, no decay, and paging
        ("adam8bit", "lamb8bit"),  # would keep Adam's eps and decay
        ("adamw", "adam"),
        ("paged_adam", "adam"),  # would stay paged
        ("adam8bit", "adam"),  # would stay at 8 bits
        ("lamb8bit", "adamw8bit"),  # has keys that AdamW lacks
        ("adamw8bit", "AdamW_32bit"),
    ],
)
def test_a_node_whose_name_alone_was_overridden_is_refused(choice: str, name: str) -> None:
    node = composed(choice, f"optimizer.name={name}", "optimizer.lr=0.5")
    meant = get_optimizer_info(name).name
    message = str(refusal(node))
    assert f"optimizer.name: '{meant}' does not fit this node" in message
    assert f"all values of '{choice}'" in message
    assert f"choose with optimizer={meant}" in message
    # Hydra 1.4 raises the error itself.
    with pytest.raises((InstantiationException, ConfigError), match="does not fit this node"):
        instantiate(node)


@pytest.mark.parametrize("name", NAMES)
def test_what_the_refusal_advises_has_the_names_own_values(name: str) -> None:
    node = composed(name, "optimizer.lr=0.5")
    assert resolve(node) == resolve(name, lr=0.5)


@pytest.mark.parametrize("spelling", ["PagedAdamW8bit", "paged_adamw_8bit", "paged_adamw8bit"])
def test_another_spelling_of_the_nodes_own_name_is_no_change(spelling: str) -> None:
    node = composed("paged_adamw8bit", f"optimizer.name={spelling}")
    assert resolve(node) == resolve("paged_adamw8bit")


def test_a_node_may_have_the_values_of_another_name_under_its_own() -> None:
    node = composed("adam8bit", "optimizer.adam_w_mode=true", "optimizer.weight_decay=0.01")
    assert resolve(node) == resolve("adam8bit", adam_w_mode=True, weight_decay=0.01)
    node = composed("adamw", "optimizer.optim_bits=8", "optimizer.is_paged=true")
    assert resolve(node) == resolve("adamw", optim_bits=8, is_paged=True)


def test_an_unknown_name_is_still_told_as_such() -> None:
    with pytest.raises(UnknownOptimizerError, match="Did you mean 'adamw8bit'"):
        resolve(composed("adam8bit", "optimizer.name=adamw8bi"))


def test_the_place_of_the_node_is_named() -> None:
    node = composed("adam8bit", "optimizer.name=lamb8bit")
    assert "model.optimizer.name: 'lamb8bit'" in str(
        refusal(OmegaConf.create({"model": {"optimizer": node}}).model.optimizer)
    )


def test_a_name_given_in_python_beside_a_node_is_refused_too() -> None:
    node = composed("paged_adam8bit")
    for given in (node, dict(node), OmegaConf.to_container(node), partial(build_optimizer, **node)):
        assert "does not fit this node" in str(refusal(given, name="adamw8bit"))
    with pytest.raises(ConfigError, match=r"build_optimizer\('adamw8bit', \.\.\.\)"):
        build_optimizer(node, torch.nn.Linear(4, 4), name="adamw8bit")


def test_the_command_line_refuses_it_as_hydra_does() -> None:
    with pytest.raises(ConfigError, match="does not fit this node"):
        resolve(read_config("paged_adam8bit", ["name=adamw8bit"]))


def test_a_copied_file_may_be_renamed_once_its_values_are_said_to_be_meant() -> None:
    values = OmegaConf.create(shipped_text("adam8bit")[1])
    values.name = "adamw8bit"
    assert "drop _made_for_" in str(refusal(values))
    del values["_made_for_"]
    assert resolve(values) == resolve("adamw8bit", adam_w_mode=False, weight_decay=0.0)


@pytest.mark.parametrize("name", NAMES)
def test_a_resolved_node_gives_another_name_that_names_own_defaults(name: str) -> None:
    config = resolve(composed("paged_adam8bit", "optimizer.lr=0.5", "optimizer.maximize=true"))
    assert resolve(config, name=name) == resolve(name, lr=0.5, maximize=True)
    assert resolve(config) == config


def test_rules_of_a_resolved_node_go_along_to_another_name() -> None:
    rules = {"no_decay": {"ndim": "<=1", "weight_decay": 0.0}}
    config = resolve({**composed("adam8bit"), "param_groups": rules})
    assert config == resolve("adam8bit", param_groups=rules)
    assert resolve(config, name="lamb8bit") == resolve("lamb8bit", param_groups=rules)
