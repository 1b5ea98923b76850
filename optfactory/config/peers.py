"""What a family is in other libraries, and how their state dicts say what its own say.

A family's class names its peers; `optfactory.checkpoints` reads and writes their state dicts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


def _no_numbers(group: Mapping[str, Any], step: float) -> dict[str, float]:
    return {}


@dataclass(frozen=True)
class Argument:
    """A hyperparameter that another library writes in a way of its own.

    Attributes:
        field: our name of it.
        read: our value of theirs.
        write: theirs, of our hyperparameters; a ValueError says why there is none.
    """

    field: str
    read: Callable[[Any], Any]
    write: Callable[[Mapping[str, Any]], Any]


@dataclass(frozen=True)
class TorchPeer:
    """The optimizer of torch.optim with a family's mathematics; its states have the same names.

    Attributes:
        name: its class.
        marks: hyperparameters that its groups have in every release ...
        strangers: ... and those that tell others with these marks.
        renamed: our names of its hyperparameters where they differ.
        arguments: those of which values differ too, by its names.
        ndim: how many dimensions its parameters have; None takes all.
        counts: whether it keeps the number of steps.
        takes_none: whether its states may be None before the first step; else they are zeros.
        numbers: what else it keeps of a parameter, from the hyperparameters and the steps so far.
    """

    name: str
    marks: tuple[str, ...]
    strangers: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    arguments: Mapping[str, Argument] = field(default_factory=dict)
    ndim: int | None = None
    counts: bool = True
    takes_none: bool = True
    numbers: Callable[[Mapping[str, Any], float], dict[str, float]] = _no_numbers


@dataclass(frozen=True)
class TorchaoPeer:
    """The low-bit optimizers of torchao with a family's mathematics.

    Attributes:
        name: what their classes begin with, as in `AdamW8bit`.
    """

    name: str


@dataclass(frozen=True)
class BitsandbytesPeer:
    """The optimizers of bitsandbytes with a family's mathematics.

    Their groups have lr, betas, eps and weight_decay, whatever these mean, and their states
    numbers: which family it is, follows from how many there are, and from these values.

    Attributes:
        states: how many states there are, 1 or 2; all of `state1` is stored in the signed map.
        is_it: whether betas and eps can be the family's.
        betas: our fields in their `betas`; empty where these are ours, "" for what is ignored.
        fixed: what they compute whatever they were asked for.
        norm: whether they keep the norm of an update.
        stacked: whether `state1` holds our first two states.
        scheduled: further fields of their groups.
    """

    states: int
    is_it: Callable[[tuple[float, ...], float], bool]
    betas: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    norm: bool = False
    stacked: bool = False
    scheduled: tuple[str, ...] = ()
