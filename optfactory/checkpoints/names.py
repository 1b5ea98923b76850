"""Names of parameters in a checkpoint, which say whether places still mean the same parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from optfactory.groups.origins import without_wrappers

# A parameter's group and its number in it.
Place = tuple[int, int]

_PARALLEL = "module."  # DistributedDataParallel keeps the model there
_SHOWN = 5


def name_problems(
    saved: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]
) -> list[list[str]]:
    """What to say, group by group, of parameters that are at other places here.

    States go by place, so that whole layers would swap theirs. A name that is not known here says
    that the model was renamed.
    """
    known = _places(groups)
    moved: list[dict[str, tuple[Place, Place]]] = [{} for _ in saved]
    for name, places in _places(saved).items():
        for place in places - known.get(name, places):
            moved[place[0]][name] = (place, min(known[name]))
    return [
        _problems(names, len(group.get("params", ())))
        for names, group in zip(moved, saved, strict=True)
    ]


def _places(groups: Sequence[Mapping[str, Any]]) -> dict[str, set[Place]]:
    """Where each name is, without what wrappers put into names."""
    found: dict[str, set[Place]] = {}
    for index, group in enumerate(groups):
        names = group.get("param_names")
        for number, name in enumerate(names if isinstance(names, (list, tuple)) else ()):
            found.setdefault(without_wrappers(str(name)), set()).add((index, number))
    if all(name.startswith(_PARALLEL) for name in found):
        return {name.removeprefix(_PARALLEL): places for name, places in found.items()}
    return found


def _problems(moved: Mapping[str, tuple[Place, Place]], size: int) -> list[str]:
    if not moved:
        return []
    begin = "param_names: the checkpoint has"
    elsewhere = [name for name, (theirs, ours) in moved.items() if theirs[0] != ours[0]]
    if elsewhere:
        return [
            f"{begin} {', '.join(elsewhere[:_SHOWN])} here, and this optimizer in another group; "
            "build it with the groups or rules that the checkpoint had"
        ]
    shown = [f"{name} as number {a[1]}, here {b[1]}" for name, (a, b) in list(moved.items())]
    listed = "; ".join(shown[:_SHOWN]) + (" ..." if len(shown) > _SHOWN else "")
    what = "the same parameters in another order" if len(moved) == size else "moved parameters"
    return [
        f"{begin} {what} ({listed}), and states go by place; build the optimizer with the "
        "checkpoint's parameters in its order"
    ]
