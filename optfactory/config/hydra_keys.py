"""Keys of a node that are Hydra's: they say how `hydra.utils.instantiate` builds it.

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
