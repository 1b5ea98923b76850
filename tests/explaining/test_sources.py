"""Where keys come from: names, aliases, files, compositions by Hydra, overrides, Python."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest
from omegaconf import OmegaConf

from optfactory import OptimizerConfig, explain, list_optimizers, optimizer_factory, resolve
from optfactory.catalog.files import shipped_text
from tests.command_line import Run
from tests.explaining.conftest import Write


def told_by(run: Run, *words: object) -> dict[str, dict[str, Any]]:
    code, out, err = run(*words, "--json")
    assert (code, err) == (0, "")
    return {key["key"]: key for key in json.loads(out)["keys"]}


def sources(keys: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Of what is no default."""
    return {key: told["source"] for key, told in keys.items() if told["source"] != "default"}


NAMED = {"name": "name", "optim_bits": "name", "state_format": "name"}


def test_a_name_states_its_width_and_all_else_is_default(run: Run) -> None:
    keys = told_by(run, "paged_adam8bit")
    assert sources(keys) == {**NAMED, "is_paged": "name"}
    values = {key: told["value"] for key, told in keys.items()}
    assert values == resolve("paged_adam8bit").model_dump(mode="json")
    assert keys["lr"]["description"] == "learning rate"


@pytest.mark.parametrize("name", list_optimizers("*8bit"))
def test_every_key_of_every_name_is_told(name: str) -> None:
    told = explain(name)
    assert {key.key: key.value for key in told.keys} == resolve(name).model_dump(mode="json")
    assert all(key.description for key in told.keys)
    locked = type(told.config).locked
    assert {key.key for key in told.keys if key.source == "name"} == set(locked)


@pytest.mark.parametrize("overrides", [(), ("lr=0.5",)])
def test_what_a_spelling_implies_is_told(overrides: tuple[str, ...], run: Run) -> None:
    keys = told_by(run, "bnb_adam8bit", *overrides)
    more = {"lr": "override"} if overrides else {}
    assert sources(keys) == {**NAMED, "adam_w_mode": "spelling", **more}
    assert keys["adam_w_mode"]["value"] is True
    assert keys["name"]["given"] == "bnb_adam8bit"
    keys = told_by(run, "bnb_adam8bit", "adam_w_mode=false")
    assert sources(keys) == {**NAMED, "adam_w_mode": "override"}


def test_an_override_that_repeats_the_default_is_one(run: Run) -> None:
    keys = told_by(run, "adam8bit", "lr=0.001", "eps=1e-6", "~betas")
    assert sources(keys) == {**NAMED, "lr": "override", "eps": "override"}
    assert (keys["lr"]["default"], keys["eps"]["default"]) == (None, 1e-8)


def test_a_file_states_what_is_in_it(run: Run, write: Write) -> None:
    file = write("name: bnb_adam8bit\nlr: '3e-4'\nbetas: '(0.5, 0.6)'\neps: 1.0e-8\n")
    keys = told_by(run, file, "eps=1e-7")
    assert sources(keys) == {
        **NAMED,
        **dict.fromkeys(("name", "lr", "betas"), "file"),
        "eps": "override",
        "adam_w_mode": "spelling",
    }
    assert (keys["lr"]["value"], keys["lr"]["given"]) == (0.0003, "3e-4")
    assert (keys["betas"]["value"], keys["betas"]["given"]) == ([0.5, 0.6], "(0.5, 0.6)")
    assert keys["eps"]["given"] == ""


def test_a_shipped_node_repeats_defaults(run: Run, write: Write) -> None:
    text = shipped_text("paged_lamb8bit")[1]
    keys = told_by(run, write(text.replace("lr: 0.001", "lr: 0.25 ")))
    assert sources(keys) == {**NAMED, "is_paged": "name", "name": "file", "lr": "file"}
    own = text.replace("_made_for_", "# _made_for_")
    assert set(sources(told_by(run, write(own))).values()) == {"file", "name"}


APP = """
defaults: [{optimizer: paged_adamw8bit}, {optimizer/param_groups: no_decay_1d}, _self_]
hydra: {searchpath: ['pkg://optfactory.configs']}
peak: "3e-3"
optimizer: {lr: '${peak}', weight_decay: 0.01, param_groups: {head: {match: "head.*", lr: "1e-2"}}}
"""


def test_a_composition_by_hydra(run: Run, write: Write) -> None:
    keys = told_by(run, write(APP))
    expected = {
        **NAMED,
        **dict.fromkeys(("name", "lr", "param_groups.no_decay", "param_groups.head"), "file"),
        "is_paged": "name",
    }
    assert sources(keys) == expected  # weight_decay is the shipped node's
    assert (keys["lr"]["value"], keys["lr"]["given"]) == (0.003, "${peak}")
    assert keys["param_groups.head"]["value"] == {"match": "head.*", "lr": 0.01}
    assert keys["param_groups.head"]["given"] == "{match: head.*, lr: 1e-2}"


def test_overrides_of_a_composition(run: Run, write: Write) -> None:
    file = write(APP)
    words = ("optimizer=lamb8bit", "optimizer.eps=1e-5", "peak=0.5")
    keys = told_by(run, file, *words)
    changed = {key: told for key, told in sources(keys).items() if told == "override"}
    assert set(changed) == {"name", "eps"}
    assert keys["lr"]["value"] == 0.5
    keys = told_by(run, file, "optimizer.param_groups.head.lr=0.5")
    rules = {key: told for key, told in sources(keys).items() if key.startswith("param_groups")}
    assert rules == {"param_groups.no_decay": "file", "param_groups.head": "override"}
    keys = told_by(run, file, "optimizer/param_groups=embeddings_32bit")
    assert sources(keys)["param_groups.embeddings"] == "override"


def test_an_app_without_a_defaults_list(run: Run, write: Write) -> None:
    file = write("optimizer: {name: adam8bit, lr: 0.5}\nseed: 1\n")
    keys = told_by(run, file, "optimizer.eps=0.1", "seed=2")
    assert sources(keys) == {**NAMED, "name": "file", "lr": "file", "eps": "override"}
    keys = told_by(run, file, "optimizer={eps: 0.1}")
    assert sources(keys) == {**NAMED, "name": "file", "lr": "file", "eps": "override"}


STATED = {"name": "adam8bit", "lr": "3e-4", "betas": [0.5, 0.6]}


@pytest.mark.parametrize(
    "cfg",
    [STATED, OmegaConf.create(STATED), resolve(STATED), optimizer_factory(STATED)],
    ids=["mapping", "omegaconf", "resolved", "partial"],
)
def test_configs_of_python(cfg: Any) -> None:
    told = explain(cfg, eps=0.5)
    found = {key.key: key.source for key in told.keys if key.source != "default"}
    expected = dict.fromkeys(("name", "lr", "betas"), "config") | {"eps": "override"}
    assert found == {**NAMED, **expected}
    lr = next(key for key in told.keys if key.key == "lr")
    assert lr.value == 0.0003
    assert lr.given == ("" if isinstance(cfg, OptimizerConfig) else "3e-4")


def test_overrides_of_a_partial_function_are_its_configs() -> None:
    told = explain(partial(optimizer_factory, "adam8bit", lr=0.5))
    assert {key.source for key in told.keys if key.key == "lr"} == {"config"}


def test_names_of_ready_rules_are_told() -> None:
    told = explain("adam", param_groups=["llama"])
    rules = [key for key in told.keys if key.key.startswith("param_groups.")]
    assert [rule.key.partition(".")[2] for rule in rules] == ["no_decay", "embeddings", "head"]
    assert {rule.description for rule in rules} == {"from the ready rules [llama]"}


def test_the_text_has_what_is_stated_first_and_all_keys(run: Run) -> None:
    code, out, err = run("bnb_adam8bit", "lr='3e-4'")
    assert (code, err) == (0, "")
    stated, named, defaults, rest = out.partition("\n\n")[2].split("\n\n")
    rows = [line for line in stated.splitlines()[1:] if line[2] != " "]
    assert [row.split()[0] for row in rows] == ["name", "lr", "adam_w_mode"]
    assert "0.0003 (given as 3e-4, default 0.001)  override" in rows[1]
    assert named.startswith("stated by the name\n  optim_bits    8")
    assert "\n  weight_decay " in defaults
    shown = {line.split()[0] for part in (stated, named, defaults) for line in part.splitlines()}
    assert set(resolve("adam8bit").model_dump()) <= shown
    assert rest.startswith("Param groups are left out")
    assert max(map(len, out.splitlines())) <= 100
