"""Which families of optimizers exist: built in, registered, and those of installed packages.

Every module in `optfactory.optimizers` that defines an `OptimizerConfig` subclass with a `family`
of its own is found by itself. Other code adds its class with `register`; an installed package names
its class in an entry point of the group `optfactory.optimizers`. What is broken there, or adds a
family that exists, is left out with a warning, and nothing else suffers from it.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterable
from functools import cache
from typing import TypeVar

from optfactory import optimizers, plugins
from optfactory.config.names import alias_table
from optfactory.config.schema import OptimizerConfig
from optfactory.errors import ConfigError
from optfactory.plugins import Plugin
from optfactory.rules.language import read_trust_ratio_text, read_update_text

Family = TypeVar("Family", bound=type[OptimizerConfig])

_registered: dict[str, type[OptimizerConfig]] = {}


def register(config_class: Family) -> Family:
    """Add a family of optimizers: names for each width, paged or not. Usable as a decorator.

    Its rule text is read at once, so that mistakes in it show here. A class of the same module and
    name replaces the one that was registered before, as when a notebook's cell runs again.

    >>> from optfactory import list_optimizers
    >>> from optfactory.optimizers.adam import AdamConfig
    >>> class CalmAdam(AdamConfig):
    ...     "Adam with a smaller learning rate."
    ...     family = "calm_adam"
    ...     lr: float = 1e-4
    >>> _ = register(CalmAdam)
    >>> list_optimizers("calm_adam*8*")
    ['calm_adam8bit', 'calm_adamfp8']

    Args:
        config_class: a subclass of `OptimizerConfig` with `family`, `rule` and `scalars`.

    Raises:
        ConfigError: the family's name is taken or unusable, or the rule text has a mistake.
    """
    _check(config_class)
    if plugins.collect(config_class):
        return config_class
    # Plugins are not loaded for this: their modules may be what is being imported.
    owner = _owner(config_class, plugins.loaded())
    if owner:
        raise ConfigError(f"the family '{config_class.family}' exists, in {owner}; choose another")
    _registered[config_class.family] = config_class
    return config_class


def families() -> dict[str, type[OptimizerConfig]]:
    """The class of each family; the first call loads those of other packages."""
    found = installed()
    refused = [item for plugin in found for item in plugin.refused]
    mine = {k: v for k, v in _registered.items() if not any(_same(v, item) for item in refused)}
    theirs = {item.family: item for plugin in found for item in plugin.classes}
    return theirs | mine | _built_in()


def installed() -> tuple[Plugin, ...]:
    """What other packages add; the first call loads it, and warns of what is left out."""
    return plugins.load(_check, _owner)


def _owner(config_class: type[OptimizerConfig], beside: Iterable[Plugin]) -> str:
    """What has a family that could be confused with a class's; empty if nothing has."""
    owners = [("optfactory", item) for item in _built_in().values()]
    owners += [(f"the package '{p.package}'", item) for p in beside for item in p.classes]
    owners += [(f"the module '{item.__module__}'", item) for item in _registered.values()]
    spellings = _spellings(config_class.family, config_class.spellings)
    for owner, other in owners:
        common = spellings & _spellings(other.family, other.spellings)
        if common and not _same(config_class, other):
            return f"{owner}, as '{other.family}'"
    return ""


def _same(one: type, other: type) -> bool:
    """Whether a class is a version of another, as when a notebook's cell runs again."""
    return (one.__module__, one.__qualname__) == (other.__module__, other.__qualname__)


@cache
def _spellings(family: str, others: tuple[str, ...]) -> frozenset[str]:
    return frozenset(alias_table(family, others))


def _check(config_class: object) -> None:
    """Refuse what makes no names, or has a mistake in its rule."""
    if not (isinstance(config_class, type) and issubclass(config_class, OptimizerConfig)):
        raise ConfigError(f"a family is a subclass of OptimizerConfig, got {config_class!r}")
    family = config_class.__dict__.get("family", "")
    usable = isinstance(family, str) and re.fullmatch(r"[a-z][a-z0-9_]*", family)
    if not usable or re.search(r"^paged|bit$", family):
        raise ConfigError(
            f"{config_class.__qualname__}.family is {family!r}; it must be a name in lower case "
            "that does not begin with 'paged' or end in 'bit'"
        )
    _check_rule(config_class)


def _check_rule(config_class: type[OptimizerConfig]) -> None:
    """Read the texts that the defaults select, and see that every scalar has a value."""
    group = config_class(name=config_class.family).model_dump()
    rule = config_class.rule(group)
    read_update_text(rule)
    if (rule.transform is not None) != config_class.of_matrices:
        raise ConfigError(
            f"{config_class.__qualname__}: a rule with transform='orthogonalize' needs the fields "
            "of optfactory.extend.MatrixConfig, and these such a rule; inherit from it, or drop "
            "the transform"
        )
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
