"""JSON Schema of optimizer configs, for editors that check and complete YAML files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

from optfactory.config.group_rules import RULES_FIELD
from optfactory.config.hydra_keys import INSTANTIATE_KEYS, MADE_FOR, TARGET, TARGETS
from optfactory.config.ready_rules import list_rules
from optfactory.group_schema import OPTIMIZER_KEY
from optfactory.registry import get_optimizer_info, list_optimizers

# Constraints that stand behind a validator of ours keep pydantic's names.
_STANDARD = {
    "ge": "minimum",
    "gt": "exclusiveMinimum",
    "le": "maximum",
    "lt": "exclusiveMaximum",
}
# Which a node may have for Hydra's `instantiate`; they are no hyperparameters.
_HYDRA_KEYS: dict[str, Any] = {
    TARGET: {"enum": sorted(TARGETS), "description": "what hydra.utils.instantiate calls"},
    **{
        key: {"description": "for hydra.utils.instantiate"}
        for key in sorted(INSTANTIATE_KEYS - {TARGET})
    },
}
DIALECT = "https://json-schema.org/draft/2020-12/schema"


def one_name(name: str) -> dict[str, Any]:
    """The schema of one optimizer's config.

    Raises:
        UnknownOptimizerError: nothing of that name.
    """
    return {"$schema": DIALECT, **_of(get_optimizer_info(name).name)}


def all_names() -> dict[str, Any]:
    """The schema of any optimizer's config: its `name` decides which keys it may have."""
    names = list_optimizers()
    return {
        "$schema": DIALECT,
        "title": "optimizer",
        "type": "object",
        "required": ["name"],
        "properties": {"name": {"enum": names, "description": "canonical optimizer name"}},
        "allOf": [
            {
                "if": {"properties": {"name": {"const": name}}},
                "then": {"$ref": f"#/$defs/{name}"},
            }
            for name in names
        ],
        "$defs": {name: _of(name) for name in names},
    }


def _of(name: str) -> dict[str, Any]:
    """A name's schema, with what the name states as the only value."""
    config_class = get_optimizer_info(name).config_class
    schema = _plain(config_class.model_json_schema())
    rules = schema["properties"][RULES_FIELD]
    rule = rules["additionalProperties"]
    own = {key: schema["properties"][key] for key in get_optimizer_info(name).defaults}
    rules["additionalProperties"] = {"anyOf": [*_kinds_of_rules(rule, own), {"type": "null"}]}
    told = {key: rules.pop(key) for key in ("description", "default")}
    ready = {"enum": list_rules()}
    several = {"type": "array", "items": ready, "minItems": 1}
    kinds = [rules, ready, several, {"type": "null"}]
    schema["properties"][RULES_FIELD] = {"anyOf": kinds, **told}
    for key, value in config_class.locked.items():
        description = schema["properties"][key]["description"]
        schema["properties"][key] = {"const": value, "description": description}
    marked = "the name whose values a node of the hydra group holds"
    schema["properties"] |= {**_HYDRA_KEYS, MADE_FOR: {"const": name, "description": marked}}
    schema["required"] = ["name"]
    return schema


def _kinds_of_rules(rule: dict[str, Any], own: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A rule with fields of this name, and one that names another optimizer and has its fields."""
    rule = {key: value for key, value in rule.items() if key != "additionalProperties"}
    fields = {key: value for key, value in rule["properties"].items() if key != OPTIMIZER_KEY}
    overrides = {key: _without_default(value) for key, value in own.items()}
    yield {**rule, "properties": {**fields, **overrides}, "additionalProperties": False}
    told = rule["properties"][OPTIMIZER_KEY]["description"]
    named = {OPTIMIZER_KEY: {"enum": list_optimizers(), "description": told}}
    yield {**rule, "properties": {**fields, **named}, "required": [OPTIMIZER_KEY]}


def _plain(schema: dict[str, Any]) -> dict[str, Any]:
    """Pydantic's schema in the words of the standard, with its definitions in place."""
    definitions = schema.pop("$defs", {})

    def follow(node: Any) -> Any:
        if isinstance(node, list):
            return [follow(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return follow(definitions[node["$ref"].rpartition("/")[2]])
        if "properties" in node:
            properties = {key: follow(value) for key, value in node["properties"].items()}
            return {
                **follow({k: node[k] for k in node if k != "properties"}),
                "properties": properties,
            }
        return {_STANDARD.get(key, key): follow(node[key]) for key in node if key != "title"}

    return cast("dict[str, Any]", follow(schema))


def _without_default(schema: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in schema.items() if key != "default"}
