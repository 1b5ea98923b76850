"""A scheduler from its name, a path or a node, and what may be made from a file.

Names are those of torch.optim.lr_scheduler. Whatever else takes an optimizer first, as functions of
transformers do, is named by its dotted path, which only the user may do: a file that somebody sent
must not decide what is imported.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer, lr_scheduler

from optfactory.config.hydra_keys import INSTANTIATE_KEYS, TARGET
from optfactory.errors import ConfigError, a_type

_HOME = "torch.optim.lr_scheduler"
NAMES = sorted(set(lr_scheduler.__all__) - {"LRScheduler"})
# Whose steps need a metric, so that no schedule follows from the config alone.
PLATEAU = "ReduceLROnPlateau"
_FUNCTION = (
    ", a function, which text cannot give: call optfactory.explain(cfg, model, "
    "scheduler=lambda optimizer: ...) from Python"
)


@dataclass(frozen=True)
class Scheduler:
    """A scheduler that can be made for an optimizer.

    Attributes:
        name: of its class or function.
        arguments: as they were given.
        make: takes the optimizer.
    """

    name: str
    arguments: Mapping[str, Any]
    make: Callable[[Optimizer], Any]


def read_scheduler(given: Any, *, is_trusted: bool, place: str = "scheduler") -> Scheduler:
    """A scheduler from a name, a dotted path, a mapping with `_target_`, or a function or class.

    Args:
        given: nested mappings with `_target_`, as of SequentialLR, are made for the same optimizer.
        is_trusted: whether other paths than torch's own may be imported.
        place: where it stands, for messages.

    Raises:
        ConfigError: there is no such scheduler, or it may not be imported.
    """
    if isinstance(given, str):
        given = {TARGET: given}
    if isinstance(given, Mapping):
        node = _Node.read(given, is_trusted, place)
        return Scheduler(node.name, node.arguments, node.make)
    if not callable(given):
        raise ConfigError(
            f"{place} is a name of {_HOME}, a mapping with {TARGET}, or a function or class "
            f"that takes the optimizer, got {given!r}"
        )
    inner = getattr(given, "func", given)  # of a partial function
    name = str(getattr(inner, "__name__", type(inner).__name__)).replace("<lambda>", "lambda")
    arguments = dict(getattr(given, "keywords", {}))
    return Scheduler(name, arguments, lambda optimizer: _called(name, given, optimizer, {}))


@dataclass(frozen=True)
class _Node:
    """A mapping with `_target_`, found and checked."""

    name: str
    target: Callable[..., Any]
    arguments: Mapping[str, Any]
    nested: Mapping[str, Any]

    @classmethod
    def read(cls, given: Mapping[str, Any], is_trusted: bool, place: str) -> _Node:
        name = given.get(TARGET)
        if not isinstance(name, str):
            raise ConfigError(f"{place} needs {TARGET}, such as {_HOME}.CosineAnnealingLR")
        if "_args_" in given:
            raise ConfigError(f"{place}._args_: give the arguments by their names")
        target = _find(name, is_trusted, place)
        # What stands for the optimizer is given later, as with `_partial_: true`.
        drop = INSTANTIATE_KEYS | {"optimizer"}
        arguments = {str(key): value for key, value in given.items() if key not in drop}
        nested = {
            key: _nested(value, is_trusted, f"{place}.{key}") for key, value in arguments.items()
        }
        return cls(name.rpartition(".")[2], target, arguments, nested)

    def make(self, optimizer: Optimizer) -> Any:
        arguments = {key: _made(value, optimizer) for key, value in self.nested.items()}
        return _called(self.name, self.target, optimizer, arguments)


def _nested(value: Any, is_trusted: bool, place: str) -> Any:
    if isinstance(value, Mapping) and TARGET in value:
        return _Node.read(value, is_trusted, place)
    if isinstance(value, (list, tuple)):
        return [_nested(item, is_trusted, f"{place}[{i}]") for i, item in enumerate(value)]
    return value


def _made(value: Any, optimizer: Optimizer) -> Any:
    if isinstance(value, _Node):
        return value.make(optimizer)
    return [_made(item, optimizer) for item in value] if isinstance(value, list) else value


def _find(name: str, is_trusted: bool, place: str) -> Callable[..., Any]:
    home, _, last = name.rpartition(".")
    if home in ("", _HOME):
        if last not in NAMES:
            raise ConfigError(f"{place}: {_unknown(last)}")
        return getattr(lr_scheduler, last)  # type: ignore[no-any-return]
    if not is_trusted:
        raise ConfigError(
            f"{place}.{TARGET}: {name!r} is not imported for a file; that is done for {_HOME}.* "
            "alone. Name it yourself, as --scheduler PATH with --scheduler-arg k=v, or leave it "
            "out by --scheduler none"
        )
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found = getattr(importlib.import_module(home), last)
    # A module may raise anything while it is loaded, and may even leave.
    except (Exception, SystemExit) as error:
        why = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ConfigError(f"{place} {name!r} cannot be loaded: {why}") from error
    if not callable(found):
        raise ConfigError(f"{place} {name!r} is {a_type(found)}, not a function or class")
    return found  # type: ignore[no-any-return]


def _unknown(name: str) -> str:
    if name.lower() == "swalr":  # the one that torch keeps elsewhere
        return f"SWALR is not in {_HOME}; torch has it as torch.optim.swa_utils.SWALR"
    lower = {known.lower(): known for known in NAMES}
    close = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.5)
    hint = f" Did you mean '{lower[close[0]]}'?" if close else ""
    return (
        f"no scheduler {name!r} in {_HOME}; there are {', '.join(NAMES)}, and others by a dotted "
        f"path.{hint}"
    )


def _called(name: str, target: Any, optimizer: Optimizer, arguments: Mapping[str, Any]) -> Any:
    """The scheduler of an optimizer.

    Raises:
        ConfigError: its arguments are wrong; names those that there are.
    """
    try:
        parameters = dict(inspect.signature(target).parameters)
    except (TypeError, ValueError):  # of an object made in C
        parameters = {}
    first = () if "optimizer" in parameters else (optimizer,)
    named = {"optimizer": optimizer} if "optimizer" in parameters else {}
    try:
        made = target(*first, **named, **arguments)
    # torch checks with several kinds of errors, others with any.
    except Exception as error:
        text = str(error).partition("\n")[0].replace(f"{name}.__init__() ", "")
        raise ConfigError(
            f"scheduler '{name}' cannot be made: {text or type(error).__name__}; it takes "
            f"{_shown(parameters)}{_FUNCTION if 'lr_lambda' in parameters else ''}"
        ) from error
    if not callable(getattr(made, "step", None)):
        raise ConfigError(f"scheduler '{name}' made {a_type(made)}, which has no method step")
    return made


def _shown(parameters: Mapping[str, inspect.Parameter]) -> str:
    """The arguments, without types: what is not optional stands without a value."""
    shown = [
        str(parameter.replace(annotation=inspect.Parameter.empty))
        for key, parameter in parameters.items()
        if key not in ("optimizer", "last_epoch")
    ]
    return ", ".join(shown) or "no arguments"


def length_of(scheduler: Any, arguments: Mapping[str, Any]) -> int | None:
    """How many steps a scheduler is made for; None if it does not say."""
    parts = getattr(scheduler, "_schedulers", None)
    starts = getattr(scheduler, "_milestones", None)
    if parts and starts:
        last = length_of(parts[-1], {})
        return None if last is None else int(starts[-1]) + last
    is_polynomial = isinstance(scheduler, lr_scheduler.PolynomialLR)
    found = (
        getattr(scheduler, "T_max", None),
        getattr(scheduler, "total_steps", None),
        getattr(scheduler, "total_iters", None) if is_polynomial else None,
        arguments.get("num_training_steps"),
    )
    lengths = [n for n in found if isinstance(n, (int, float)) and not isinstance(n, bool)]
    if not lengths or not 1 <= lengths[0] < math.inf:  # such as T_max=0, which torch lets through
        return None
    return int(lengths[0])
