"""The registry: which optimizer names exist, and the schema of each.

Families are found by themselves: every module in `optfactory.optimizers` that defines an
`OptimizerConfig` subclass with a `family` of its own yields six names. Other packages add theirs
with `register`, or name their class in an entry point of the group `optfactory.optimizers`.
"""

from __future__ import annotations

import importlib
import logging
import pkgutil
import re
from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from importlib.metadata import entry_points
from typing import Any, Literal, TypeVar, overload

from pydantic import Field, create_model

from optfactory import optimizers
from optfactory.config.group_rules import RULES_FIELD, GroupRules
from optfactory.config.names import (
    OptimizerName,
    alias_table,
    names_of_family,
    normalize,
    unknown_name,
)
from optfactory.config.schema import OptimizerConfig
from optfactory.errors import ConfigError
from optfactory.rules.language import read_trust_ratio_text, read_update_text

ENTRY_POINTS = "optfactory.optimizers"

_log = logging.getLogger("optfactory")


@dataclass(frozen=True)
class OptimizerInfo:
    """One row of the registry.

    >>> info = get_optimizer_info("paged_lamb8bit")
    >>> info.family, info.optim_bits, info.is_paged, info.defaults["lr"]
    ('lamb', 8, True, 0.001)

    Attributes:
        name: canonical name, e.g. ``paged_adam8bit``.
        family: the schema and rule it shares with its siblings, e.g. ``adam``.
        optim_bits: the state width the name states, or None where the config chooses.
        is_paged: whether the name states paged state.
        description: the first sentence of the family's schema.
        defaults: every hyperparameter's default.
        aliases: other spellings, normalized (lower case, no ``_`` or ``-``).
        config_class: the pydantic model that validates this name.
    """

    name: str
    family: str
    optim_bits: int | None
    is_paged: bool
    description: str
    defaults: dict[str, Any]
    aliases: tuple[str, ...]
    config_class: type[OptimizerConfig]


Family = TypeVar("Family", bound=type[OptimizerConfig])

_registered: dict[str, type[OptimizerConfig]] = {}


def register(config_class: Family) -> Family:
    """Add a family of optimizers: six names with 8-bit and paged state. Usable as a decorator.

    Its rule text is read at once, so that mistakes in it show here. A class of the same module and
    name replaces the one that was registered before, as when a notebook's cell runs again.

    >>> from optfactory.optimizers.adam import AdamConfig
    >>> class CalmAdam(AdamConfig):
    ...     "Adam with a smaller learning rate."
    ...     family = "calm_adam"
    ...     lr: float = 1e-4
    >>> _ = register(CalmAdam)
    >>> list_optimizers("calm_adam*")
    ['calm_adam', 'calm_adam32bit', 'calm_adam8bit']

    Args:
        config_class: a subclass of `OptimizerConfig` with `family`, `rule` and `scalars`.

    Raises:
        ConfigError: the family's name is taken or unusable, or the rule text has a mistake.
    """
    family = config_class.__dict__.get("family", "")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", family) or re.search(r"^paged|bit$", family):
        raise ConfigError(
            f"{config_class.__qualname__}.family is {family!r}; it must be a name in lower case "
            "that does not begin with 'paged' or end in 'bit'"
        )
    # Not those of entry points: their modules come here while they are loaded.
    other = (_built_in() | _registered).get(family)
    if other is not None and _place(other) != _place(config_class):
        raise ConfigError(f"the family '{family}' exists, in {other.__module__}; choose another")
    _check_rule(config_class)
    _registered[family] = config_class
    _families.cache_clear()
    _table.cache_clear()
    return config_class


def _place(config_class: type) -> tuple[str, str]:
    return config_class.__module__, config_class.__qualname__


def _check_rule(config_class: type[OptimizerConfig]) -> None:
    """Read the texts that the defaults select, and see that every scalar has a value."""
    group = config_class(name=config_class.family).model_dump()
    rule = config_class.rule(group)
    read_update_text(rule)
    if rule.trust_ratio is not None:
        read_trust_ratio_text(rule)
    expected = {"decay", "step_size", *rule.scalars}
    given = set(config_class.scalars(group, 1))
    if given != expected:
        raise ConfigError(
            f"{config_class.__qualname__}.scalars returns {sorted(given)}; "
            f"the rule '{rule.name}' needs {sorted(expected)}"
        )


@cache
def _families() -> dict[str, type[OptimizerConfig]]:
    found = _built_in() | _registered
    for entry in entry_points(group=ENTRY_POINTS):
        config_class = entry.load()
        other = found.setdefault(config_class.family, config_class)
        if _place(other) != _place(config_class):
            raise ConfigError(
                f"the entry point '{entry.value}' adds the family '{config_class.family}', which "
                f"{other.__module__} has; uninstall one of the two"
            )
    return found


@cache
def _built_in() -> dict[str, type[OptimizerConfig]]:
    found: dict[str, type[OptimizerConfig]] = {}
    for module_info in pkgutil.iter_modules(optimizers.__path__):
        module = importlib.import_module(f"{optimizers.__name__}.{module_info.name}")
        for item in vars(module).values():
            if (
                isinstance(item, type)
                and issubclass(item, OptimizerConfig)
                and item.__module__ == module.__name__
                and "family" in vars(item)
            ):
                found[item.family] = item
    return found


@cache
def _table() -> dict[str, OptimizerInfo]:
    names = [name for family in _families() for name in names_of_family(family)]
    aliases = alias_table(str(name) for name in names)
    table = {}
    for name in names:
        spellings = tuple(key for key, target in aliases.items() if target == str(name))
        table[str(name)] = _info(name, spellings)
    return table


def _info(name: OptimizerName, aliases: tuple[str, ...]) -> OptimizerInfo:
    family = _families()[name.family]
    config_class = _config_class(name, family)
    defaults = {
        key: field.get_default()
        for key, field in config_class.model_fields.items()
        if key not in ("name", RULES_FIELD)
    }
    description = (family.__doc__ or "").strip().partition("\n")[0]
    return OptimizerInfo(
        name=str(name),
        family=name.family,
        optim_bits=name.bits,
        is_paged=name.paged,
        description=description,
        defaults=defaults,
        aliases=aliases,
        config_class=config_class,
    )


def _config_class(name: OptimizerName, family: type[OptimizerConfig]) -> type[OptimizerConfig]:
    """The family's schema with `name` fixed, what the name states locked, and rules for groups."""
    locked: dict[str, object] = {"name": str(name)}
    if name.bits is not None:
        locked["optim_bits"] = name.bits
    if name.paged:
        locked["is_paged"] = True
    fields: dict[str, Any] = {}
    for key, value in locked.items():
        field = copy(family.model_fields[key])
        field.default = value
        fields[key] = (field.annotation, field)
    fields[RULES_FIELD] = (GroupRules, Field(default={}, description="rules for param groups"))
    class_name = "".join(part.title() for part in str(name).split("_")) + "Config"
    model = create_model(class_name, __base__=family, __module__=__name__, **fields)
    model.locked = locked
    model.__doc__ = family.__doc__
    return model


def __getattr__(name: str) -> type[OptimizerConfig]:
    # Another process that unpickles a config asks for its class before anything built the table.
    for info in _table().values():
        if info.config_class.__name__ == name:
            return info.config_class
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def canonical_name(text: str) -> str:
    """The canonical name behind a name or alias.

    Raises:
        UnknownOptimizerError: nothing of that name; names the closest that exists.
    """
    table = _table()
    if text in table:
        return text
    key = normalize(text)
    name = alias_table(table).get(key)
    if name is None:
        raise unknown_name(text, table)
    if key.startswith("bnb"):
        _log.info("optimizer '%s' is named '%s' here", text, name)
    return name


def get_optimizer_info(name: str) -> OptimizerInfo:
    """Everything the registry knows of one optimizer; accepts aliases.

    >>> get_optimizer_info("PagedAdamW8bit").name
    'paged_adamw8bit'

    Raises:
        UnknownOptimizerError: nothing of that name.
    """
    return _table()[canonical_name(name)]


Patterns = str | Iterable[str]


@overload
def list_optimizers(
    filter: Patterns = ..., exclude_filters: Patterns = ..., *, with_description: Literal[True]
) -> list[tuple[str, str]]: ...
@overload
def list_optimizers(
    filter: Patterns = ...,
    exclude_filters: Patterns = ...,
    with_description: Literal[False] = ...,
) -> list[str]: ...
def list_optimizers(
    filter: Patterns = "", exclude_filters: Patterns = "", with_description: bool = False
) -> list[str] | list[tuple[str, str]]:
    """All canonical names, sorted; optionally only those that match a glob.

    >>> list_optimizers("*8bit", exclude_filters="paged*")
    ['adam8bit', 'adamw8bit', 'lamb8bit']

    Args:
        filter: a glob such as ``*8bit`` or several; empty selects all.
        exclude_filters: globs of names to leave out.
        with_description: return (name, description) pairs.
    """
    wanted, unwanted = _patterns(filter), _patterns(exclude_filters)
    names = [
        name
        for name in sorted(_table())
        if (not wanted or any(fnmatchcase(name, pattern) for pattern in wanted))
        and not any(fnmatchcase(name, pattern) for pattern in unwanted)
    ]
    if with_description:
        return [(name, _table()[name].description) for name in names]
    return names


def _patterns(given: Patterns) -> list[str]:
    patterns = [given] if isinstance(given, str) else list(given)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise ConfigError(f"filters are globs such as '*8bit', got {given!r}")
    return [pattern for pattern in patterns if pattern]
