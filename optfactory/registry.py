"""The registry: which optimizer names exist, and the schema of each.

Each family of `optfactory.families` yields eight names, each with a schema of its own.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from copy import copy
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache, cached_property, lru_cache
from typing import Any, Literal, overload

from pydantic import Field, create_model

from optfactory import plugins
from optfactory.config.group_rules import (
    OTHERS_FIELD,
    RULES_FIELD,
    WHOLE_FIELDS,
    GroupRules,
    Others,
)
from optfactory.config.names import (
    OptimizerName,
    alias_table,
    names_of_family,
    normalize,
    unknown_name,
)
from optfactory.config.schema import OptimizerConfig
from optfactory.config.widths import refuse_coarse
from optfactory.errors import ConfigError, UnknownOptimizerError
from optfactory.families import families

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
        states: what the name states of the width of state, by field; nothing where the config
            chooses.
        is_paged: whether the name states paged state.
        description: the first sentence of the family's schema.
        defaults: every hyperparameter's default.
        aliases: other spellings, normalized (lower case, no ``_`` or ``-``).
        base: the schema of the family.
        config_class: the pydantic model that validates this name.
    """

    name: str
    family: str
    states: Mapping[str, object] = field(hash=False)
    is_paged: bool
    description: str
    aliases: tuple[str, ...]
    base: type[OptimizerConfig] = field(repr=False)

    @property
    def optim_bits(self) -> int | None:
        """The bits that the name states, or None where the config chooses."""
        bits = self.states.get("optim_bits")
        return bits if isinstance(bits, int) else None

    # Made when they are asked for: a schema takes longer than all that a list of names needs.
    @cached_property
    def config_class(self) -> type[OptimizerConfig]:
        return _config_class(self, self.base)

    @cached_property
    def _defaults(self) -> dict[str, Any]:
        return {
            key: item.get_default()
            for key, item in self.config_class.model_fields.items()
            if key not in ("name", *WHOLE_FIELDS)
        }

    @property
    def defaults(self) -> dict[str, Any]:
        return dict(self._defaults)  # callers may change theirs


def _table() -> Mapping[str, OptimizerInfo]:
    return _rows_of(tuple(families().values()))


@lru_cache(maxsize=8)
def _rows_of(schemas: tuple[type[OptimizerConfig], ...]) -> Mapping[str, OptimizerInfo]:
    return {name: info for schema in schemas for name, info in _rows(schema).items()}


# By family, so that a class stays the one that pickled configs name when another family comes.
@cache
def _rows(family: type[OptimizerConfig]) -> dict[str, OptimizerInfo]:
    """The names of a family."""
    names = names_of_family(family.family, family.too_coarse)
    aliases = alias_table(family.family, family.spellings, family.too_coarse)
    return {
        str(name): _info(name, family, tuple(k for k, v in aliases.items() if v == str(name)))
        for name in names
    }


def _info(
    name: OptimizerName, family: type[OptimizerConfig], aliases: tuple[str, ...]
) -> OptimizerInfo:
    description = (family.__doc__ or "").strip().partition("\n")[0]
    return OptimizerInfo(
        name=str(name),
        family=name.family,
        states=name.states,
        is_paged=name.paged,
        description=description,
        aliases=aliases,
        base=family,
    )


def _config_class(info: OptimizerInfo, family: type[OptimizerConfig]) -> type[OptimizerConfig]:
    """The family's schema with `name` fixed, what the name states locked, and rules for groups."""
    locked: dict[str, object] = {"name": info.name}
    locked |= info.states
    if info.is_paged:
        locked["is_paged"] = True
    fields: dict[str, Any] = {}
    for key, value in locked.items():
        locked_field = copy(family.model_fields[key])
        locked_field.default = value
        fields[key] = (locked_field.annotation, locked_field)
    fields[RULES_FIELD] = (GroupRules, Field(default={}, description="rules for param groups"))
    if family.of_matrices:
        told = "what is no hidden matrix: {name: adamw8bit, ...}; by default AdamW of these bits"
        fields[OTHERS_FIELD] = (Others, Field(default={}, description=told))
    model = create_model(_class_name(info.name), __base__=family, __module__=__name__, **fields)
    model.locked = locked
    model.__doc__ = family.__doc__
    return model


def _class_name(name: str) -> str:
    return "".join(part.title() for part in name.split("_")) + "Config"


def __getattr__(name: str) -> type[OptimizerConfig]:
    # Another process that unpickles a config asks for its class before anything built the table.
    # The import system asks for `__path__` while modules load, when nothing may be built.
    if re.fullmatch(r"[A-Z]\w*Config", name):
        for info in _table().values():
            if _class_name(info.name) == name:
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
    name = next((name for name, info in table.items() if key in info.aliases), None)
    if name is None:
        _refuse_withheld(text, key)
        left_out = [f" Left out: {plugin}." for plugin in plugins.loaded() if plugin.problem]
        raise UnknownOptimizerError("".join([str(unknown_name(text, table)), *left_out]))
    if key.startswith("bnb"):
        _log.info("optimizer '%s' is named '%s' here", text, name)
    return name


def _refuse_withheld(text: str, key: str) -> None:
    """Say of a name that does not exist on purpose why it does not."""
    for family, schema in families().items():
        withheld = alias_table(family, schema.spellings)
        width = next((w for w in schema.too_coarse if withheld.get(key, "").endswith(w)), None)
        if width is not None:
            try:
                refuse_coarse(family, schema.too_coarse, [width])
            except ValueError as error:
                at_8_bits = withheld[key].removesuffix(width) + "8bit"
                raise UnknownOptimizerError(
                    f"there is no optimizer '{text}': {error}, or take {at_8_bits}"
                ) from None


def implied_fields(text: str, name: str) -> dict[str, Any]:
    """What a spelling says beside the name: with ``bnb`` it means bitsandbytes' rule.

    >>> implied_fields("bnb_adam8bit", "adam8bit"), implied_fields("Adam8bit", "adam8bit")
    ({'adam_w_mode': True}, {})

    Args:
        text: the spelling.
        name: the canonical name behind it.
    """
    family = _table()[name].base
    peer = family.bitsandbytes_peer
    if peer is None or "bnb" not in normalize(text):
        return {}
    return {k: v for k, v in peer.fixed.items() if v != family.model_fields[k].get_default()}


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

    >>> list_optimizers("adam*8bit", exclude_filters="paged*")
    ['adam8bit', 'adamw8bit']

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
