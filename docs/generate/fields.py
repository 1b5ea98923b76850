"""The fields of a schema as rows of a table: key, values, default, what it does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optfactory.catalog.json_schema import one_name
from optfactory.config.schema import OptimizerConfig, family_class
from optfactory.registry import get_optimizer_info

_BOUNDS = {
    "minimum": "≥ {}",
    "exclusiveMinimum": "> {}",
    "maximum": "≤ {}",
    "exclusiveMaximum": "< {}",
}
_KINDS = {"number": "number", "integer": "integer", "string": "text", "boolean": "true, false"}


def own_rows(family: str) -> list[list[str]]:
    """Fields that a family has alone, or with other values than other families."""
    common = OptimizerConfig.model_fields
    own = family_class(get_optimizer_info(family).config_class).model_fields
    keys = [
        key
        for key, field in own.items()
        if key != "name" and (key not in common or field.default != common[key].default)
    ]
    first = ["lr", "weight_decay"]
    return _rows(family, first + [key for key in keys if key not in first])


def common_rows() -> list[list[str]]:
    """Fields that all families have, with the defaults that most of them have."""
    keys = [
        key for key in OptimizerConfig.model_fields if key not in ("name", "lr", "weight_decay")
    ]
    return _rows("adamw", keys)


def _rows(family: str, keys: list[str]) -> list[list[str]]:
    properties = one_name(family)["properties"]
    fields = get_optimizer_info(family).config_class.model_fields
    return [
        [
            f"`{key}`",
            _values(properties[key]),
            f"`{_written(fields[key].get_default())}`",
            _cell(fields[key].description or ""),
        ]
        for key in keys
    ]


def _values(schema: Mapping[str, Any]) -> str:
    """Which values a field takes, in words."""
    if "anyOf" in schema:
        return " or ".join(_values(kind) for kind in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(f"`{_written(value)}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{_written(schema['const'])}`"
    kind = schema.get("type")
    if kind == "array":
        items = schema.get("prefixItems")
        each = _values(items[0] if items else schema.get("items", {}))
        return f"{len(items)} of: {each}" if items else f"list of: {each}"
    if kind == "object":
        return f"mapping to: {_values(schema.get('additionalProperties', {}))}"
    if kind == "null":
        return "`null`"
    bounds = [text.format(_written(schema[key])) for key, text in _BOUNDS.items() if key in schema]
    return ", ".join([_KINDS.get(str(kind), "any"), *bounds])


def _written(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "null"
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_written, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _cell(text: str) -> str:
    return text.replace("|", r"\|")
