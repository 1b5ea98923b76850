"""A small reader of JSON Schema: the package `jsonschema` need not be installed."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "number": (int, float),
    "integer": int,
    "null": type(None),
}
ANNOTATIONS = {"$schema", "$defs", "title", "description", "default", "then", "prefixItems"}
CHECKS: dict[str, Callable[[Any, Any], bool]] = {
    "const": lambda want, value: type(want) is type(value) and want == value,
    "enum": lambda want, value: any(type(w) is type(value) and w == value for w in want),
    "minimum": lambda limit, value: not _is(value, "number") or value >= limit,
    "maximum": lambda limit, value: not _is(value, "number") or value <= limit,
    "exclusiveMinimum": lambda limit, value: not _is(value, "number") or value > limit,
    "exclusiveMaximum": lambda limit, value: not _is(value, "number") or value < limit,
    "minItems": lambda limit, value: not _is(value, "array") or len(value) >= limit,
    "maxItems": lambda limit, value: not _is(value, "array") or len(value) <= limit,
    "pattern": lambda want, value: not _is(value, "string") or bool(re.search(want, value)),
    "required": lambda keys, value: not _is(value, "object") or set(keys) <= value.keys(),
    "type": lambda want, value: any(_is(value, t) for t in ([want] if str(want) == want else want)),
}


# Keywords that apply other schemas.
APPLICATORS = {"$ref", "anyOf", "allOf", "if", "items", "properties", "additionalProperties"}


def _is(value: object, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    return isinstance(value, TYPES[kind])


def accepts(schema: dict[str, Any], value: Any, root: dict[str, Any] | None = None) -> bool:
    """JSON Schema 2020-12, the keywords that these schemas use; any other is a KeyError."""
    root = schema if root is None else root
    for keyword, want in schema.items():
        if keyword in CHECKS:
            good = CHECKS[keyword](want, value)
        elif keyword == "$ref":
            path, _, name = want.rpartition("/")
            assert path == "#/$defs", f"{want} is not within the schema"
            good = accepts(root["$defs"][name], value, root)
        elif keyword in ("anyOf", "allOf"):
            good = {"anyOf": any, "allOf": all}[keyword](accepts(s, value, root) for s in want)
        elif keyword == "if":
            good = not accepts(want, value, root) or accepts(schema["then"], value, root)
        elif keyword == "items":
            start = len(schema.get("prefixItems", ()))
            rest = value[start:] if _is(value, "array") else []
            good = all(accepts(want, item, root) for item in rest)
        elif keyword in ("properties", "additionalProperties"):
            good = not _is(value, "object") or _properties(schema, keyword, value, root)
        elif keyword in ANNOTATIONS:
            good = keyword != "prefixItems" or not _is(value, "array") or all(
                accepts(part, item, root) for part, item in zip(want, value, strict=False)
            )  # fmt: skip
        else:
            raise KeyError(f"{keyword!r} is no keyword of JSON Schema")
        if not good:
            return False
    return True


def _properties(
    schema: dict[str, Any], keyword: str, value: dict[str, Any], root: dict[str, Any]
) -> bool:
    known = schema.get("properties", {})
    if keyword == "properties":
        return all(accepts(known[key], value[key], root) for key in value.keys() & known.keys())
    more, others = schema[keyword], [value[key] for key in value.keys() - known.keys()]
    return not others if more is False else all(accepts(more, item, root) for item in others)
