"""`optfactory schema`: standard JSON Schema that accepts what ships and refuses what is wrong."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml

from optfactory import (
    get_optimizer_info,
    list_optimizers,
    list_rules,
    ready_rules,
    resolve,
)
from optfactory.catalog import json_schema
from optfactory.catalog.files import config_folder
from optfactory.cli import main
from optfactory.errors import ConfigError
from tests.unit.json_schema_checker import ANNOTATIONS, APPLICATORS, CHECKS, accepts

NAMES = list_optimizers()
WORDS = {*CHECKS, *ANNOTATIONS, *APPLICATORS}


@pytest.fixture(scope="module")
def valid() -> Callable[[Any, str], bool]:
    """Whether the schema of a name accepts a value; that of all names must say the same."""
    schemas = {"": json_schema.all_names()} | {name: json_schema.one_name(name) for name in NAMES}
    judges: dict[str, Any] = {}
    if importlib.util.find_spec("jsonschema"):  # a second opinion on our own reading above
        from jsonschema import Draft202012Validator

        judges = {name: Draft202012Validator(schema) for name, schema in schemas.items()}

    def one(value: Any, name: str) -> bool:
        found = accepts(schemas[name], value)
        assert not judges or judges[name].is_valid(value) == found
        return found

    def both(value: Any, name: str = "") -> bool:
        found = one(value, name or value["name"])
        assert one(value, "") == found
        return found

    return both


# ---- the schemas themselves -------------------------------------------------------------------


def nodes(schema: Any, named: bool = False) -> Iterator[dict[str, Any]]:
    """Every subschema; `named` says that the keys are names."""
    if isinstance(schema, list):
        for item in schema:
            yield from nodes(item)
    elif isinstance(schema, dict):
        if not named:
            yield schema
        for key, item in schema.items():
            if named or key not in ("const", "enum", "default"):
                yield from nodes(item, not named and key in ("properties", "$defs"))


@pytest.mark.parametrize("name", ["", *NAMES])
def test_only_words_of_the_standard_occur_and_references_stay_inside(name: str) -> None:
    schema = json_schema.one_name(name) if name else json_schema.all_names()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    for node in nodes(schema):
        assert node.keys() <= WORDS
        if "$ref" in node:
            assert node["$ref"].removeprefix("#/$defs/") in schema["$defs"]
    assert json.loads(json.dumps(schema, allow_nan=False)) == schema


@pytest.mark.parametrize("name", NAMES)
def test_a_schema_describes_every_key_and_gives_its_default(name: str) -> None:
    properties = json_schema.one_name(name)["properties"]
    hydras = [properties.pop(key) for key in list(properties) if key.startswith("_")]
    assert all("hydra" in schema["description"] for schema in hydras)
    fields = get_optimizer_info(name).config_class.model_fields
    defaults = resolve(name).model_dump(mode="json")
    assert properties.keys() == fields.keys()
    for key, schema in properties.items():
        assert schema["description"] == fields[key].description
        assert schema.get("const", schema.get("default")) == defaults[key]


# ---- what they accept -------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_shipped_files_are_valid(name: str, valid: Callable[..., bool]) -> None:
    config = yaml.safe_load((config_folder() / f"{name}.yaml").read_text(encoding="utf-8"))
    assert valid(config)
    assert valid({"name": name})
    others = [other for other in ("adam", "paged_adamw8bit", "lamb32bit") if other != name]
    assert not any(accepts(json_schema.one_name(other), config) for other in others)


@pytest.mark.parametrize("rules", list_rules())
def test_the_shipped_rules_are_valid(rules: str, valid: Callable[..., bool]) -> None:
    assert valid({"name": "adamw8bit", "param_groups": ready_rules(rules)})
    resolve({"name": "adamw8bit", "param_groups": rules})
    assert valid({"name": "adamw8bit", "param_groups": rules})
    assert valid({"name": "adamw8bit", "param_groups": [rules]})


RULES: list[tuple[Any, bool]] = [
    ({"match": "a.*", "lr": 1}, True),
    ({"match": ["a.*", "b"], "optim_bits": 32}, True),
    ({"modules": ["Linear"], "is_paged": True}, True),
    ({"match": "a.*", "optimizer": "rmsprop8bit", "alpha": 0.5}, True),
    ({"match": "a.*", "optimizer": "nosuch"}, False),
    ({"match": "a.*", "alpha": 0.5}, False),
    ({"regex": "x$", "lr_scale": 0.5, "betas": [0.5, 0.6]}, True),
    ({"ndim": 1, "weight_decay": 0}, True),
    ({"ndim": "<=1", "weight_decay": 0.0}, True),
    ({"layer_decay": 1, "blocks": "h.*"}, True),
    ({"listed_by": "no_weight_decay", "weight_decay": 0, "optional": True}, True),
    (None, True),
    ({"match": "a", "weight_decy": 0}, False),
    ({"match": "a", "param_groups": {}}, False),
    ({"match": "a", "name": "adam"}, False),
    ({"match": 3, "lr": 1}, False),
    ({"match": [3], "lr": 1}, False),
    ({"ndim": 1.5, "lr": 1}, False),
    ({"ndim": [1], "lr": 1}, False),
    ({"ndim": "abc", "lr": 1}, False),
    ({"ndim": -1, "lr": 1}, False),
    ({"match": "a", "lr": -1}, False),
    ({"match": "a", "lr_scale": 0}, False),
    ({"layer_decay": 1.01}, False),
    ({"layer_decay": 0}, False),
    ({"match": "a", "optim_bits": 12}, False),
    ({"match": "a", "optional": "perhaps", "lr": 1}, False),
    ("no_decay_1d", False),
    (["a"], False),
]


@pytest.mark.parametrize(("rule", "good"), RULES)
@pytest.mark.parametrize("name", ["adam", "paged_lamb8bit"])
def test_rules_are_checked(name: str, rule: Any, good: bool, valid: Callable[..., bool]) -> None:
    config = {"name": name, "param_groups": {"label": rule}}
    assert valid(config) == good
    with_resolve(config, good)


def with_resolve(config: dict[str, Any], good: bool) -> None:
    """The package itself says the same."""
    if good:
        resolve(config)
    else:
        with pytest.raises(ConfigError):
            resolve(config)


VALUES: list[tuple[str, Any, bool]] = [
    *(("lr", value, good) for value, good in [(0, True), (1e-3, True), (-1e-9, False)]),
    *(("lr", value, False) for value in (True, "fast", None, [1e-3], {})),
    *(("betas", value, good) for value, good in [([0, 0.5], True), ([0.9, 1.0], False)]),
    *(("betas", value, False) for value in ([0.9], [0.9, 0.95, 0.99], 0.9, [-0.1, 0.9])),
    *(("block_size", value, good) for value, good in [(64, True), (100, False), (0, False)]),
    *(("min_8bit_size", value, good) for value, good in [(0, True), (-1, False), (1.5, False)]),
    *(("percentile_clipping", value, good) for value, good in [(0, True), (100, True)]),
    *(("percentile_clipping", value, False) for value in (-1, 101, "5%")),
    *(("page_memory", value, good) for value, good in [("auto", True), ("both", False)]),
    *(("page_dir", value, good) for value, good in [(None, True), (3, False)]),
    *(("maximize", value, good) for value, good in [(True, True), ([], False), (None, False)]),
    *(("optim_bits", value, False) for value in (12, 32.5, None, "wide")),
    *((key, 1, False) for key in ("lrr", "learning_rate", "fused", "title", "trust", "Lr")),
    *(("param_groups", value, good) for value, good in [({}, True), ([], False), ("x", False)]),
    *(("param_groups", value, True) for value in (None, "llama", ["llama", "embeddings_32bit"])),
    *(("param_groups", value, False) for value in (["llama", "x"], ["llama", 3], 3, "", [None])),
]


@pytest.mark.parametrize(("key", "value", "good"), VALUES)
@pytest.mark.parametrize("name", ["adamw8bit", "paged_lamb8bit"])
def test_values_are_checked_as_the_package_does(
    name: str, key: str, value: Any, good: bool, valid: Callable[..., bool]
) -> None:
    assert valid({"name": name, key: value}) == good
    with_resolve({"name": name, key: value}, good)


def test_what_a_name_states_cannot_be_contradicted(valid: Callable[..., bool]) -> None:
    for name in NAMES:
        info = get_optimizer_info(name)
        for bits in (8, 16, 32):
            config = {"name": name, "optim_bits": bits}
            assert valid(config) == (info.optim_bits in (None, bits))
        assert valid({"name": name, "is_paged": False}) == (not info.is_paged)
        assert valid({"name": name, "is_paged": True})


def test_keys_of_one_family_are_unknown_in_others(valid: Callable[..., bool]) -> None:
    assert valid({"name": "lamb", "trust_ratio": "clip", "max_unorm": 2})
    assert not valid({"name": "adam", "trust_ratio": "clip"})
    rules = {"a": {"match": "a", "always_adapt": False}}
    assert valid({"name": "lamb", "param_groups": rules})
    assert not valid({"name": "adam", "param_groups": rules})


def test_a_config_needs_a_name_that_exists() -> None:
    schema = json_schema.all_names()
    for bad in ({}, {"lr": 1}, {"name": "nosuch"}, {"name": None}, {"name": ["adam"]}, [], "adam"):
        assert not accepts(schema, bad)
        assert not accepts(json_schema.one_name("adam"), bad)
    assert set(schema["properties"]["name"]["enum"]) == set(NAMES) == schema["$defs"].keys()


# ---- the command ------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [[], ["--json"]])
def test_the_command_prints_json(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", *words]) == 0
    assert json.loads(capsys.readouterr().out) == json_schema.all_names()
    assert main(["schema", "AdamW8bit", *words]) == 0
    assert json.loads(capsys.readouterr().out) == json_schema.one_name("adamw8bit")


def test_an_unknown_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", "adm8bit"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "Did you mean 'adam8bit'?" in err
