"""Rules in a Hydra app: composed, overridden, removed and mounted as any other part of a config."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, OmegaConf

from optfactory import build_optimizer, list_optimizers, list_rules, ready_rules, resolve
from optfactory.errors import ConfigError
from tests.families import NAMES_OF_FIRST
from tests.param_groups.harness import Net, Rules, got

SEARCH_PATH = "hydra: {searchpath: ['pkg://optfactory.configs']}\n"
APP = """
defaults:
  - optimizer: paged_adamw8bit
  - optimizer/param_groups: [no_decay_1d, embeddings_32bit]
  - _self_
optimizer:
  lr: 0.01
  param_groups:
    head: {match: "head.*", lr_scale: 10}
"""
READY: Rules = {
    "no_decay": {"ndim": "<=1", "weight_decay": 0.0},
    "embeddings": {"modules": ["Embedding", "EmbeddingBag"], "optim_bits": 32},
}
HEAD = {"match": "head.*", "lr_scale": 10}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path, APP)
    return tmp_path


def write(folder: Path, text: str) -> None:
    (folder / "config.yaml").write_text(text + SEARCH_PATH)


def composed(folder: Path, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(folder), version_base="1.3"):
        return compose("config", list(overrides))


def rules(folder: Path, *overrides: str, node: str = "optimizer") -> Rules:
    """The rules of the composed config, which must be valid."""
    found = OmegaConf.select(composed(folder, *overrides), node)
    resolve(found)
    return dict(OmegaConf.to_container(found, resolve=True)["param_groups"])


def test_ready_rules_and_those_of_the_app_are_merged_in_order(folder: Path) -> None:
    found = rules(folder)
    assert found == {**READY, "head": HEAD}
    assert list(found) == ["no_decay", "embeddings", "head"]


def test_a_value_in_a_rule_is_overridden(folder: Path) -> None:
    found = rules(folder, "optimizer.param_groups.head.lr_scale=5")
    assert found["head"] == {**HEAD, "lr_scale": 5}
    optimizer = build_optimizer(
        composed(folder, "optimizer.param_groups.head.lr_scale=5").optimizer, Net()
    )
    assert got(optimizer, "lr")["head.weight"] == 0.05
    assert got(optimizer, "optim_bits")["embed.weight"] == 32
    assert got(optimizer, "weight_decay")["norm.bias"] == 0.0


def test_a_rule_is_added(folder: Path) -> None:
    added = "+optimizer.param_groups.bias={match: '*.bias', lr_scale: 2, betas: [0.5, 0.5]}"
    found = rules(folder, added)
    assert list(found) == ["no_decay", "embeddings", "head", "bias"]
    assert found["bias"] == {"match": "*.bias", "lr_scale": 2, "betas": [0.5, 0.5]}
    cfg = composed(folder, added).optimizer
    assert got(build_optimizer(cfg, Net()), "betas")["head.bias"] == (0.5, 0.5)


def test_a_key_is_added_to_a_ready_rule_and_removed_from_one(folder: Path) -> None:
    found = rules(folder, "+optimizer.param_groups.embeddings.lr_scale=0.5")
    assert found["embeddings"] == {**READY["embeddings"], "lr_scale": 0.5}
    found = rules(
        folder, "~optimizer.param_groups.head.lr_scale", "+optimizer.param_groups.head.lr=3e-4"
    )
    assert found["head"] == {"match": "head.*", "lr": 3e-4}


@pytest.mark.parametrize(
    "override", ["~optimizer.param_groups.embeddings", "optimizer.param_groups.embeddings=null"]
)
def test_a_rule_is_removed(folder: Path, override: str) -> None:
    cfg = composed(folder, override).optimizer
    assert list(resolve(cfg).model_dump()["param_groups"]) == ["no_decay", "head"]
    assert set(got(build_optimizer(cfg, Net()), "optim_bits").values()) == {8}


@pytest.mark.parametrize(
    "override",
    ["~optimizer.param_groups", "optimizer.param_groups=null", "++optimizer.param_groups=null"],
)
def test_all_rules_are_removed(folder: Path, override: str) -> None:
    config = resolve(composed(folder, override).optimizer)
    assert config.model_dump()["param_groups"] == {}


def test_other_ready_rules_are_chosen(folder: Path) -> None:
    found = rules(folder, "optimizer/param_groups=vit_layer_decay")
    assert found == {**ready_rules("vit_layer_decay"), "head": HEAD}
    found = rules(folder, "optimizer/param_groups=[embeddings_32bit,llama]")
    assert list(found) == ["embeddings", "no_decay", "head"]
    # The app's `head` is merged key by key into that of the ready rules.
    assert found["head"] == {**ready_rules("llama")["head"], **HEAD}
    # The later of two files with the same label adds to it.
    assert found["embeddings"] == ready_rules("llama")["embeddings"]


def test_no_ready_rules_are_chosen(folder: Path) -> None:
    assert rules(folder, "optimizer/param_groups=[]") == {"head": HEAD}


@pytest.mark.parametrize("name", ["adam", "adamw32bit", "lamb8bit", "paged_lamb"])
def test_the_users_rules_survive_another_name(folder: Path, name: str) -> None:
    cfg = composed(folder, f"optimizer={name}").optimizer
    assert cfg.name == name
    config = resolve(cfg)
    dump = config.model_dump(mode="json")["param_groups"]
    assert list(dump) == ["no_decay", "embeddings", "head"]
    assert dump["head"] == HEAD


@pytest.mark.parametrize("order", ["rules first", "rules last"])
def test_the_place_in_the_defaults_list_does_not_matter(tmp_path: Path, order: str) -> None:
    lines = ["  - optimizer: lamb8bit", "  - optimizer/param_groups: no_decay_1d"]
    lines = lines[::-1] if order == "rules first" else lines
    write(tmp_path, "\n".join(["defaults:", *lines, "  - _self_", ""]))
    assert rules(tmp_path) == {"no_decay": READY["no_decay"]}


def test_optimizer_and_rules_are_mounted_elsewhere(tmp_path: Path) -> None:
    write(
        tmp_path,
        "defaults:\n"
        "  - optimizer@model.optimizer: adamw8bit\n"
        "  - optimizer/param_groups@model.optimizer.param_groups: [no_decay_1d, embeddings_32bit]\n"
        "  - _self_\n"
        "model: {optimizer: {param_groups: {head: {match: 'head.*', lr_scale: 10}}}}\n",
    )
    node = "model.optimizer"
    assert rules(tmp_path, node=node) == {**READY, "head": HEAD}
    found = rules(
        tmp_path,
        "optimizer@model.optimizer=lamb",
        "model.optimizer.param_groups.head.lr_scale=2",
        "~model.optimizer.param_groups.no_decay",
        node=node,
    )
    assert found == {"embeddings": READY["embeddings"], "head": {**HEAD, "lr_scale": 2}}
    wrong = composed(tmp_path, "+model.optimizer.param_groups.head.lrr=2").model.optimizer
    with pytest.raises(ConfigError, match=r"model\.optimizer\.param_groups\.head\.lrr: unknown"):
        resolve(wrong)


def test_two_optimizers_have_rules_of_their_own(tmp_path: Path) -> None:
    write(
        tmp_path,
        "defaults:\n"
        "  - optimizer@generator: adamw8bit\n"
        "  - optimizer@critic: lamb\n"
        "  - optimizer/param_groups@generator.param_groups: no_decay_1d\n"
        "  - optimizer/param_groups@critic.param_groups: embeddings_32bit\n"
        "  - _self_\n",
    )
    assert rules(tmp_path, node="generator") == {"no_decay": READY["no_decay"]}
    assert rules(tmp_path, node="critic") == {"embeddings": READY["embeddings"]}


def test_interpolations_reach_into_rules(tmp_path: Path) -> None:
    write(tmp_path, APP + "scale: 3\n")
    cfg = composed(tmp_path, "optimizer.param_groups.head.lr_scale='${scale}'").optimizer
    assert got(build_optimizer(cfg, Net()), "lr")["head.bias"] == pytest.approx(0.03)


def test_a_typo_gets_past_neither_hydra_nor_the_schema(folder: Path) -> None:
    with pytest.raises(ConfigCompositionException):
        composed(folder, "optimizer.param_groups.head.lrscale=5")
    cfg = composed(folder, "+optimizer.param_groups.head.lrscale=5").optimizer
    with pytest.raises(ConfigError, match=r"optimizer\.param_groups\.head\.lrscale: .*'lr_scale'"):
        resolve(cfg)


def test_the_groups_options_are_the_names_and_those_below_the_ready_rules(folder: Path) -> None:
    # A sweep's glob(*) chooses among these.
    with initialize_config_dir(str(folder), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        options = loader.get_group_options("optimizer", ObjectType.CONFIG, "config", [])
        below = loader.get_group_options("optimizer/param_groups", ObjectType.CONFIG, "config", [])
    assert sorted(options) == list_optimizers()
    assert set(NAMES_OF_FIRST) <= set(options)
    assert sorted(below) == list_rules()
