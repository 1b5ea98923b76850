"""What a checkpoint says, in one form whatever library wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from optfactory.checkpoints.fields import Fields
from optfactory.state.codec import BlockGrid, CodeMap
from optfactory.state.layout import StateLayout

# What this run says, whatever run a checkpoint comes from: where state lives ...
PLACEMENT = ("is_paged", "page_dir", "page_memory", "capturable")
# ... and how it is stored; what the checkpoint stores otherwise is converted.
STORAGE = (
    *("optim_bits", "state_format", "state_bits", "min_8bit_size", "block_size", "block_wise"),
    *("signed_map", "second_moment_floor", "compat"),
)
# ... and what it does around the rule.
AROUND = (
    *("percentile_clipping", "skip_zeros", "nonfinite", "state_rounding", "param_rounding"),
    *("master_weights", "seed", "annotations", "cautious", "cautious_weight_decay"),
    *("neuron_norm", "neuron_beta"),
)
# ... how matrices are multiplied, and in which memory ...
PRODUCTS = ("ns_dtype", "ns_memory")
# ... and which matrices its parameters are made of.
MATRICES = ("split", "flatten")
# What else a group holds beside its hyperparameters and its users' labels.
MARKS = ("params", "param_names", "optimizer", "format_version")


@dataclass(frozen=True)
class Quantized:
    """One state of codes as it was stored.

    Attributes:
        codes: uint8, of the parameter's shape.
        scales: float32, one per block in the order of the grid's blocks.
        grid: which elements share a scale; it need not be a grid that this library writes.
        qmap: what the codes stand for.
    """

    codes: Tensor
    scales: Tensor
    grid: BlockGrid
    qmap: CodeMap


StoredState = Tensor | Quantized


@dataclass(frozen=True)
class Record:
    """One parameter's state.

    Attributes:
        step: a 0-d float64 tensor.
        states: the rule's states by name.
        extras: what options keep (`EXTRA_KEYS`), as far as it was stored.
    """

    step: Tensor
    states: Mapping[str, StoredState]
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        step: Tensor | None,
        states: Mapping[str, StoredState | None],
        extras: Mapping[str, Tensor | None] | None = None,
    ) -> Record | None:
        """The record of these parts; None if one of them could not be read."""
        found = {name: stored for name, stored in states.items() if stored is not None}
        kept = {key: value for key, value in (extras or {}).items() if value is not None}
        whole = len(found) == len(states) and len(kept) == len(extras or {})
        return cls(step, found, kept) if step is not None and whole else None


@dataclass(frozen=True)
class GroupRecord:
    """One param group.

    Attributes:
        family: whose mathematics the state belongs to; empty where the checkpoint does not say.
        values: hyperparameters under our names, and users' labels.
        problems: why the group cannot be read.
        families: one of these it is where it does not say.
    """

    family: str
    values: Mapping[str, Any]
    problems: list[str] = field(default_factory=list)
    families: tuple[str, ...] = ()


class Layout(Protocol):
    """How one library lays out a state dict; all methods are free of side effects."""

    def read_group(self, saved: Mapping[str, Any]) -> GroupRecord:
        """The hyperparameters of one saved group."""

    def read_entries(
        self, fields: Fields, layout: StateLayout, saved: Mapping[str, Any]
    ) -> Record | None:
        """The state of one parameter of a saved group; None if `fields` noted a problem."""


class Export(Protocol):
    """How to write another library's state dict.

    Attributes:
        title: the library, or its optimizers.
        families: ours that it has.
        takes_dtensors: whether it trains sharded parameters, with state that is sharded alike.
    """

    title: str
    families: tuple[str, ...]
    takes_dtensors: bool

    @property
    def expressed(self) -> tuple[str, ...]:
        """Hyperparameters that may have other values than their defaults."""

    def write_problems(self, group: Mapping[str, Any]) -> list[str]:
        """What of a group the other library would not go on with."""

    def write_group(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """The other library's hyperparameters."""

    def write_entries(
        self, layout: StateLayout, record: Record, group: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The other library's state of one parameter, as a copy."""
