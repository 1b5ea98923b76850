"""Where the value of each key comes from: the name, a file, an override, the family's default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from optfactory.catalog.overrides import Source
from optfactory.config.group_rules import OTHERS_FIELD, RULES_FIELD
from optfactory.config.hydra_keys import MADE_FOR
from optfactory.config.schema import OptimizerConfig
from optfactory.errors import UnknownOptimizerError
from optfactory.explaining.cells import shown
from optfactory.explaining.figures import (
    CONFIG,
    DEFAULT,
    FILE,
    NAME,
    OVERRIDE,
    SPELLING,
    Key,
    plain_json,
)
from optfactory.factory import values_of
from optfactory.registry import canonical_name, get_optimizer_info, implied_fields


@dataclass(frozen=True)
class Given:
    """A config as it was handed over, before it was validated.

    Attributes:
        text: what it was read from.
        kind: what states its values, but for overrides: `NAME`, `FILE` or `CONFIG`.
        values: as they were written.
        overridden: the keys that overrides set, dotted where they are nested.
    """

    text: str
    kind: str
    values: Mapping[str, Any]
    overridden: frozenset[str] = field(default_factory=frozenset)

    @classmethod
    def from_python(cls, cfg: Any, overrides: Mapping[str, Any]) -> Given:
        """What `resolve` takes."""
        values, _ = values_of(cfg, overrides)
        kind = NAME if isinstance(cfg, str) else CONFIG
        text = cfg if isinstance(cfg, str) else f"a config of type {type(cfg).__name__}"
        return cls(text, kind, values, frozenset(overrides))

    @classmethod
    def from_source(cls, source: Source) -> Given:
        """What a command line names."""
        values: Any = source.node
        if not isinstance(values, dict):
            from omegaconf import OmegaConf

            # Interpolations as they stand there: what they lead to is the value.
            values = OmegaConf.to_container(values, resolve=False)
        kinds = {"name": NAME, "file": FILE, "composition": FILE}
        texts = {"name": source.text, "file": f"file {source.text}"}
        text = texts.get(source.kind, f"file {source.text}, composed by Hydra")
        return cls(text, kinds[source.kind], values, source.overridden)

    def is_overridden(self, key: str) -> bool:
        """Whether an override sets a key, one inside it or one around it."""
        return any(
            key == path or key.startswith(f"{path}.") or path.startswith(f"{key}.")
            for path in self.overridden
        )


def keys_of(config: OptimizerConfig, given: Given) -> tuple[Key, ...]:
    """Every key of a config in the order of its fields, rules one by one."""
    dumped = config.model_dump(mode="json")
    defaults = (
        get_optimizer_info(config.name).config_class(name=config.name).model_dump(mode="json")
    )
    keys = []
    for key, item in type(config).model_fields.items():
        told = str(item.description or "")
        if key == RULES_FIELD and dumped[key]:
            keys += _rules(dumped[key], given)
            continue
        source = _source(key, dumped[key], defaults[key], config, given)
        raw = given.text if key == "name" and given.kind == NAME else given.values.get(key)
        differs = source not in (NAME, DEFAULT) and dumped[key] != defaults[key]
        keys.append(
            Key(
                key=key,
                value=dumped[key],
                source=source,
                description=told,
                given=_as_written(raw, dumped[key]),
                default=defaults[key] if differs and key != "name" else None,
            )
        )
    return tuple(keys)


def _source(key: str, value: Any, default: Any, config: OptimizerConfig, given: Given) -> str:
    if key in config.locked and key != "name":
        return NAME
    if given.is_overridden(key):
        return OVERRIDE
    implied = implied_fields(str(given.values.get("name", config.name)), config.name)
    if given.kind == NAME and key in _implied_by_text(given):
        return SPELLING
    if key not in given.values:
        return SPELLING if key in implied else DEFAULT
    lists_all = MADE_FOR in given.values and key != "name"
    empty = key in (RULES_FIELD, OTHERS_FIELD) and not value
    return DEFAULT if (lists_all and value == default) or empty else given.kind


def _implied_by_text(given: Given) -> dict[str, Any]:
    """What the spelling implies that the command line or Python was given as the config."""
    try:
        return implied_fields(given.text, canonical_name(given.text))
    except UnknownOptimizerError:
        return {}


def _rules(rules: Mapping[str, Any], given: Given) -> list[Key]:
    """A row for each rule: they may be stated in several places."""
    written = given.values.get(RULES_FIELD)
    ready = "" if isinstance(written, Mapping) or written is None else _text(written)
    rows = []
    for label, rule in rules.items():
        key = f"{RULES_FIELD}.{label}"
        raw = written.get(label) if isinstance(written, Mapping) else None
        rows.append(
            Key(
                key=key,
                value=rule,
                source=OVERRIDE if given.is_overridden(key) else given.kind,
                description=f"from the ready rules {ready}" if ready else "rule for param groups",
                given=_as_written(raw, rule),
            )
        )
    return rows


def _as_written(raw: Any, value: Any) -> str:
    """How a value was written; empty if that is what it is."""
    plain = plain_json(raw)
    # Text inside a rule counts too: {lr: "3e-4"}.
    same = plain == value and isinstance(plain, bool) == isinstance(value, bool)
    return "" if same or raw is None else _text(raw)


def _text(raw: Any) -> str:
    return raw if isinstance(raw, str) else shown(plain_json(raw))
