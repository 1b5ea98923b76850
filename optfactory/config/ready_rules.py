"""Rules for param groups that come with the package, for configs written in Python.

In Hydra they are the config group `optimizer/param_groups`: one line in a defaults list adds them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from optfactory.errors import ConfigError
from optfactory.rules.resources import data_dir


def list_rules() -> list[str]:
    """The names of the rules that come with the package, sorted.

    >>> list_rules()
    ['embeddings_32bit', 'llama', 'no_decay_1d', 'vit_layer_decay']
    """
    return sorted(path.stem for path in rules_folder().glob("*.yaml"))


def ready_rules(*names: str) -> dict[str, Any]:
    """Rules that come with the package, as a mapping to edit and to give as `param_groups`.

    >>> ready_rules("no_decay_1d", "embeddings_32bit")["no_decay"]
    {'ndim': '<=1', 'weight_decay': 0.0}

    Args:
        names: of `list_rules()`; the rules of later names follow, and replace those of the same
            label.

    Raises:
        ConfigError: there are no rules of a name.
    """
    rules: dict[str, Any] = {}
    for name in names:
        if name not in list_rules():
            raise ConfigError(f"no rules named {name!r}; there are {', '.join(list_rules())}")
        rules |= yaml.safe_load((rules_folder() / f"{name}.yaml").read_text(encoding="utf-8"))
    return rules


def rules_folder() -> Path:
    """The folder of the shipped config group `optimizer/param_groups`."""
    return data_dir("configs") / "optimizer" / "param_groups"
