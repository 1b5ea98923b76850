"""What bitsandbytes' optimizers read beside their param groups, and optfactory's do not.

Nothing is imported for it: who has not loaded bitsandbytes has set nothing there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

_LIBRARY = "bitsandbytes"
# Its embeddings ask for 32-bit state, also as copies, which its manager does not know.
_EMBEDDINGS = ("StableEmbedding", "Embedding")
_SHOWN_NAMES = 5


def overlooked(groups: Sequence[Mapping[str, Any]], models: Sequence[nn.Module] = ()) -> str:
    """What to say of settings in bitsandbytes that the groups do not have; empty if none.

    Args:
        groups: an optimizer's param groups.
        models: the Modules that their parameters were taken from.
    """
    if _LIBRARY not in sys.modules:
        return ""
    settings: dict[int, dict[str, Any]] = {}
    for parameter, values in (*_of_modules(models), *_of_manager()):
        settings[parameter] = {**settings.get(parameter, {}), **values}
    found = {
        _name(group, number, index): _differing(group, settings[id(p)])
        for number, group in enumerate(groups if settings else ())
        for index, p in enumerate(group["params"])
        if id(p) in settings
    }
    names = [name for name, values in found.items() if values]
    return _warning(names, found[names[0]]) if names else ""


def _of_modules(models: Sequence[nn.Module]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for module in {module for model in models for module in model.modules()}:
        kinds = [kind for kind in type(module).__mro__ if kind.__name__ in _EMBEDDINGS]
        if any(kind.__module__.partition(".")[0] == _LIBRARY for kind in kinds):
            yield id(module.weight), {"optim_bits": 32}


def _of_manager() -> Iterator[tuple[int, Mapping[str, Any]]]:
    """What its GlobalOptimManager was told, by the id of the parameter, as it keeps it."""
    optim = getattr(sys.modules[_LIBRARY], "optim", None)
    manager = getattr(getattr(optim, "GlobalOptimManager", None), "_instance", None)
    for module, name, values in getattr(manager, "module_weight_config_triple", ()):
        yield id(getattr(module, name, None)), values
    yield from getattr(manager, "pid2config", {}).items()


def _differing(group: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    def alike(value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    return {
        key: value
        for key, value in values.items()
        if key not in group or bool(alike(group[key]) != alike(value))
    }


def _name(group: Mapping[str, Any], number: int, index: int) -> str:
    names = group.get("param_names")
    return str(names[index]) if names else f"param_groups[{number}]['params'][{index}]"


def _warning(names: Sequence[str], values: Mapping[str, Any]) -> str:
    shown = ", ".join(names[:_SHOWN_NAMES])
    more = f" and {len(names) - _SHOWN_NAMES} more" if names[_SHOWN_NAMES:] else ""
    said = ", ".join(f"{key}={value!r}" for key, value in values.items())
    return (
        f"bitsandbytes' GlobalOptimManager or StableEmbedding says {said} for {shown}{more}, which "
        "this optimizer does not read: say it in the config's param_groups, by module or by name, "
        "e.g. {'embeddings': {'modules': 'Embedding', 'optim_bits': 32}} (the ready rule "
        "embeddings_32bit) or {'wide': {'match': 'head.*', 'optim_bits': 32}}"
    )
