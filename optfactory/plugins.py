"""What other packages add, named by entry points of the group `optfactory.optimizers`.

An entry point runs a stranger's code, perhaps while that code is only half imported: one that fails
is noted and warned of once, and one that comes too early is tried again later.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint, entry_points

from optfactory.config.schema import OptimizerConfig

ENTRY_POINTS = "optfactory.optimizers"


@dataclass(frozen=True)
class Plugin:
    """One entry point.

    Attributes:
        package: name and version of the distribution.
        entry: the entry point's text.
        classes: the class that it names and those that its module registers, as far as usable.
        refused: those of families that exist.
        problem: what is wrong; empty if nothing is.
    """

    package: str
    entry: str
    classes: tuple[type[OptimizerConfig], ...] = ()
    refused: tuple[type[OptimizerConfig], ...] = ()
    problem: str = ""

    def __str__(self) -> str:
        return f"the package '{self.package}' (entry point '{self.entry}'): {self.problem}"


class _State(threading.local):
    """What this thread is loading: each loads by itself, and the import system's locks suffice."""

    collected: list[type[OptimizerConfig]] | None = None


_loading = _State()
_outcomes: dict[EntryPoint, Plugin] = {}  # entry points whose code has run
_plugins: tuple[Plugin, ...] | None = None  # None until all have


def loaded() -> tuple[Plugin, ...]:
    """The plugins, if they were loaded already."""
    return _plugins or ()


def collect(config_class: type[OptimizerConfig]) -> bool:
    """Count a class to the entry point that is being loaded; False where none is."""
    if _loading.collected is None:
        return False
    _loading.collected.append(config_class)
    return True


def load(
    check: Callable[[object], None],
    clash: Callable[[type[OptimizerConfig], Sequence[Plugin]], str],
) -> tuple[Plugin, ...]:
    """Every plugin; the first call loads them, and warns of those that are left out.

    Args:
        check: raises where a class is none that can be used.
        clash: what else has a class's family, beside other plugins; empty if nothing has.
    """
    global _plugins
    if _plugins is not None:
        return _plugins
    if _loading.collected is not None:  # its module asks for names while it is loaded
        return (Plugin("", "", tuple(_loading.collected)),)
    found = [_load(entry, check) for entry in entry_points(group=ENTRY_POINTS)]
    plugins = [plugin for plugin in found if plugin]
    judged = tuple(
        _judge(plugin, [p for p in plugins if p is not plugin], clash) for plugin in plugins
    )
    if None in found:
        return judged
    _plugins = judged
    for plugin in judged:
        if plugin.problem:
            warnings.warn(f"optimizers are left out of {plugin}", stacklevel=2)
    return judged


def _judge(
    plugin: Plugin,
    others: Sequence[Plugin],
    clash: Callable[[type[OptimizerConfig], Sequence[Plugin]], str],
) -> Plugin:
    """The plugin without the families that something else has."""
    owners = {item: clash(item, others) for item in plugin.classes}
    refused = tuple(item for item, owner in owners.items() if owner)
    problems = [
        f"its family '{item.family}' is also in {owners[item]}; uninstall one of the two"
        for item in refused
    ]
    return replace(
        plugin,
        classes=tuple(item for item in plugin.classes if item not in refused),
        refused=refused,
        problem=plugin.problem or "; ".join(problems),
    )


def _load(entry: EntryPoint, check: Callable[[object], None]) -> Plugin | None:
    """Load one entry point; None where its module is being imported, and is to be tried later."""
    if entry in _outcomes:
        return _outcomes[entry]
    plugin = Plugin(_package(entry), entry.value)
    _loading.collected = []
    try:
        config_class = entry.load()
        check(config_class)
        classes = tuple(dict.fromkeys([config_class, *_loading.collected]))
        plugin = replace(plugin, classes=classes)
    # Whatever a stranger's module does, scripts that end the process included.
    except (Exception, SystemExit) as error:
        if "partially initialized module" in str(error) and _anything_is_being_imported():
            return None
        text = f"{type(error).__name__}: {error}".partition("\n")[0]
        plugin = replace(plugin, problem=f"{text}; update or uninstall the package")
    finally:
        _loading.collected = None
    _outcomes[entry] = plugin
    return plugin


def _anything_is_being_imported() -> bool:
    specs = [getattr(module, "__spec__", None) for module in list(sys.modules.values())]
    return any(getattr(spec, "_initializing", False) for spec in specs)


def _package(entry: EntryPoint) -> str:
    distribution = getattr(entry, "dist", None)
    return f"{distribution.name} {distribution.version}" if distribution else entry.name
