"""Keys of a node that are no hyperparameters: most say how `hydra.utils.instantiate` builds it.

The shipped nodes have a `_target_`, so that apps which instantiate their optimizer can choose ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TARGET = "_target_"
# What `_target_` says in the shipped nodes.
SHIPPED_TARGET = "optfactory.optimizer_factory"
TARGETS = {
    f"{module}.{function}"
    for module in ("optfactory", "optfactory.factory")
    for function in ("optimizer_factory", "build_optimizer")
}

# Those of Hydra 1.3 and 1.4 that change nothing of what is built. `_args_` would, and is refused.
INSTANTIATE_KEYS = frozenset(
    {TARGET, "_partial_", "_convert_", "_recursive_", "_isolate_", "_execution_whitelist_"}
)
# Whose defaults a shipped node lists. It lists all, so that one whose `name` alone was changed
# would give the new name the old one's values.
MADE_FOR = "_made_for_"
NODE_KEYS = INSTANTIATE_KEYS | {MADE_FOR}


def target_problem(values: Mapping[str, Any], path: str) -> str:
    """Why a node's target is not what would be built; empty if it is, or there is none."""
    target = values.get(TARGET, SHIPPED_TARGET)
    if target in TARGETS:
        return ""
    where = f"{path}.{TARGET}" if path else TARGET
    return (
        f"{where}: {target!r} is not an optimizer of optfactory, which would be built in its "
        f"place; build the node with hydra.utils.instantiate, or drop {TARGET} and set name"
    )


def renamed_problem(values: Mapping[str, Any], path: str) -> str:
    """Why a node cannot have the name that it has; empty if it can, or says nothing of it."""
    name = values["name"]
    made_for = values.get(MADE_FOR, name)
    if made_for == name:
        return ""
    where = f"{path}.name" if path else "name"
    return (
        f"{where}: {name!r} does not fit this node, which holds all values of {made_for!r}, "
        f"defaults included; choose with optimizer={name} (in Python, build_optimizer({name!r}, "
        f"...)), or in a file of your own, drop {MADE_FOR} and see that each value is meant"
    )
