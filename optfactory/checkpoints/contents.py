"""What a checkpoint file may hold: what torch.load reads with weights_only=True."""

from __future__ import annotations

import io
import os
import re
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint

from optfactory.config.plain import plain_scalar

_PLAIN = (type(None), bool, int, float, complex, str, bytes, Tensor, torch.nn.Parameter)


def storable(value: Any, within: tuple[int, ...] = ()) -> Any:
    """A value with numbers and texts of NumPy, and of derived classes, as Python's own.

    What holds none of them stays the same object.

    Args:
        within: the ids of the containers that hold it, for those that hold themselves.
    """
    if type(value) not in (dict, list, tuple):
        is_scalar = isinstance(value, (int, float, str)) or type(value).__module__ == "numpy"
        return plain_scalar(value) if is_scalar else value
    if id(value) in within:
        return value
    inside = (*within, id(value))
    if type(value) is dict:
        pairs = [(plain_scalar(key), storable(item, inside)) for key, item in value.items()]
        changed = any(
            a is not c or b is not d for (a, b), (c, d) in zip(pairs, value.items(), strict=True)
        )
        return dict(pairs) if changed else value
    items = [storable(item, inside) for item in value]
    changed = any(one is not other for one, other in zip(items, value, strict=True))
    return type(value)(items) if changed else value


def refused_classes(file: BinaryIO, message: str = "") -> list[str]:
    """The classes and functions in a file of torch.save that a safe load does not call.

    Args:
        message: of the failed load; files of torch's old format are not looked through.
    """
    file.seek(0)
    try:
        return get_unsafe_globals_in_checkpoint(file)
    except Exception:  # of many kinds: it is no zip file, or a damaged one
        return re.findall(r"GLOBAL ([\w.]+\w)", message)[:1]


def problems(obj: Any) -> list[str]:
    """Where an object holds what cannot be saved and read back, of what type, and a remedy."""
    return [problem for place, leaf in _leaves(obj, ()) for problem in _problem(place, leaf)]


def _leaves(
    value: Any, place: tuple[str, ...], within: tuple[int, ...] = ()
) -> Iterator[tuple[str, Any]]:
    """Everything in a nest of containers that is none itself, with its dotted path."""
    if id(value) in within:
        return
    inside = (*within, id(value))
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            yield from _leaves(key, (*place, f"{key!s} (the key)"), inside)
            yield from _leaves(item, (*place, str(key)), inside)
    elif type(value) in (list, tuple, set):
        for index, item in enumerate(value):
            yield from _leaves(item, (*place, str(index)), inside)
    elif type(value) not in _PLAIN:
        yield ".".join(place) or "the object", value


def _problem(place: str, leaf: Any) -> list[str]:
    kind = f"{type(leaf).__module__}.{type(leaf).__qualname__}"
    file = io.BytesIO()
    try:
        torch.save(leaf, file)
    except Exception as error:  # whatever a stranger's pickling raises
        return [f"{place}: a {kind}, which cannot be pickled ({error})"]
    return [f"{place}: a {kind}; {_remedy(leaf)}"] if refused_classes(file) else []


def _remedy(leaf: Any) -> str:
    if hasattr(leaf, "model_dump"):
        return "store its .model_dump()"
    if isinstance(leaf, os.PathLike):
        return "store str(path)"
    if hasattr(leaf, "__array__") and not isinstance(leaf, Tensor):
        return "store torch.from_numpy(array), or array.tolist()"
    if isinstance(leaf, (dict, list, tuple, set, frozenset)):
        return "store a plain dict, list, tuple or set"
    return "store its values, as numbers, texts, lists, dicts and tensors"
