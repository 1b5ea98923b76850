"""Groups whose parameters an engine replaced by one flat tensor, as DeepSpeed's ZeRO does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from optfactory.config.schema import OptimizerConfig
from optfactory.config.validation import config_error

Group = Mapping[str, Any]


class Built:
    """The parameters that groups had when their optimizer was built, by identity."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self._ids = {id(group): frozenset(map(id, group["params"])) for group in groups}

    def refuse_flattened(
        self, groups: Sequence[Group], schema_of: Callable[[Group], type[OptimizerConfig]]
    ) -> None:
        """Raise where something of whole tensors is needed, and one flat one took their place.

        Norms and decisions would be those of a piece of all of them, silently.

        Raises:
            ConfigError: names the groups and what to do.
        """
        problems = []
        for index, group in enumerate(groups):
            family = schema_of(group)
            needs = _needs(group, family) if self._is_flattened(group, family) else ""
            if needs:
                problems.append(
                    f"param_groups[{index}].params: an engine replaced the parameters by one flat "
                    f"tensor, and {needs}; use adam or adamw without it, shard with fully_shard "
                    "(FSDP2), or train without sharding"
                )
        if problems:
            raise config_error("a param group that changed", problems)

    def _is_flattened(self, group: Group, family: type[OptimizerConfig]) -> bool:
        before = self._ids.get(id(group), frozenset())
        new: list[Tensor] = [p for p in group["params"] if id(p) not in before]
        is_flat = len(group["params"]) == len(new) == 1 and new[0].ndim == 1
        # A vector is something else than even a single matrix was.
        return is_flat and len(before) > (0 if family.of_matrices else 1)


def _needs(group: Group, family: type[OptimizerConfig]) -> str:
    """What of a group's hyperparameters asks for whole tensors; empty if nothing does."""
    if family.rule(group).trust_ratio is not None:
        return f"'{family.family}' needs the norms of whole tensors"
    if family.of_matrices:
        return f"'{family.family}' needs whole matrices"
    if group["cautious"]:
        return "cautious steps need what is known of whole tensors"
    if group["percentile_clipping"] < 100:
        return "percentile_clipping needs the norms of whole tensors"
    if not group["block_wise"]:
        return "block_wise: false needs the scale of whole tensors"
    return ""
