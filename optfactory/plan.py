"""One step's work: parameters with a gradient, in buckets that a backend runs at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from optfactory.errors import ConfigError
from optfactory.param_groups import parameter_problem
from optfactory.rules import UpdateRule
from optfactory.schema import OptimizerConfig
from optfactory.state import StateLayout


@dataclass(eq=False)
class Slot:
    """One parameter with all that its update needs; compared by identity.

    Attributes:
        parameter, name: the tensor, and its name for messages.
        group: its torch param group, read at every step.
        layout: how its state is stored.
        state: its state tensors by key; empty until `Optimizer2State.init_states`.
    """

    parameter: Tensor
    name: str
    group: dict[str, Any]
    layout: StateLayout
    state: dict[str, Tensor] = field(default_factory=dict)

    def allocate(self) -> dict[str, Tensor]:
        """Fresh state for this parameter, placed as its group says."""
        return self.layout.allocate(self.parameter.device, self.group["page_dir"])


@dataclass(frozen=True)
class BucketKey:
    """What the parameters of one bucket share: one kernel can update all of them."""

    device: torch.device
    parameter: torch.dtype
    gradient: torch.dtype
    rule: UpdateRule
    quantized: bool
    block_size: int


@dataclass(eq=False)
class Bucket:
    """Parameters that one backend call updates together.

    Attributes:
        slots, gradients: the parameters, and this step's gradient of each; no gradients between
            steps.
        config_class: the schema that computes the scalars.
        tables: what the backend keeps between steps while the slots stay the same.
    """

    key: BucketKey
    config_class: type[OptimizerConfig]
    slots: list[Slot]
    gradients: list[Tensor]
    tables: Any = None

    def scalar_rows(self, steps: list[float]) -> tuple[list[list[float]], list[int]]:
        """The distinct rows of scalars of this step, and the row of each slot.

        A row holds `rule.all_scalars` in order; slots share it when group and step are the same.
        """
        rows: list[list[float]] = []
        row_of: dict[tuple[int, float], int] = {}
        indices = []
        names = self.key.rule.all_scalars
        for slot, step in zip(self.slots, steps, strict=True):
            key = (id(slot.group), step)
            index = row_of.get(key)
            if index is None:
                scalars = self.config_class.scalars(slot.group, int(step))
                index = row_of[key] = len(rows)
                rows.append([scalars[name] for name in names])
            indices.append(index)
        return rows, indices


class StepPlan:
    """Gathers buckets step by step, and keeps a bucket as long as its parameters stay."""

    def __init__(self, slots: Iterable[Slot], config_class: type[OptimizerConfig]) -> None:
        self.slots = list(slots)
        self.config_class = config_class
        self.parameter_ids = [id(slot.parameter) for slot in self.slots]
        self._buckets: dict[int, Bucket] = {}
        # A key's hash is long to compute, so that buckets are found by their key's number.
        self._keys: list[BucketKey] = []
        self._numbers: dict[tuple[Any, ...], int] = {}

    def gather(self) -> list[Bucket]:
        """The buckets of all parameters that have a gradient now.

        Raises:
            ConfigError: a gradient is sparse or of a dtype no kernel takes; nothing was changed.
        """
        found: dict[int, tuple[list[Slot], list[Tensor]]] = {}
        for slot in self.slots:
            p = slot.parameter
            gradient = p.grad
            if gradient is None:
                continue
            # Looked up by everything that may change under an optimizer's feet: a kernel that
            # trusted an old dtype or size would write outside of its buffers.
            shapes = (p.shape, gradient.shape)
            facts = (slot, p.dtype, p.device, shapes, gradient.dtype, gradient.device)
            number = self._numbers.get(facts)
            if number is None or gradient.layout is not torch.strided:
                number = self._numbers[facts] = self._number_of(slot, gradient)
            members = found.get(number)
            if members is None:
                members = found[number] = ([], [])
            members[0].append(slot)
            members[1].append(gradient)
        return [self._bucket(number, *members) for number, members in found.items()]

    def _bucket(self, number: int, slots: list[Slot], gradients: list[Tensor]) -> Bucket:
        bucket = self._buckets.get(number)
        if bucket is None or bucket.slots != slots:
            bucket = Bucket(self._keys[number], self.config_class, slots, gradients)
            self._buckets[number] = bucket
        bucket.gradients = gradients
        return bucket

    def _number_of(self, slot: Slot, gradient: Tensor) -> int:
        p = slot.parameter
        problem = _problem(slot, gradient)
        if problem:
            raise ConfigError(f"cannot update {slot.name}: {problem}")
        key = BucketKey(
            p.device,
            p.dtype,
            gradient.dtype,
            slot.layout.rule,
            slot.layout.quantized,
            slot.layout.grid.block_size,
        )
        if key not in self._keys:
            self._keys.append(key)
        return self._keys.index(key)


def _problem(slot: Slot, gradient: Tensor) -> str:
    """Why a parameter cannot be updated with this gradient; empty if it can."""
    p, layout = slot.parameter, slot.layout
    moments = layout.rule.states[0].name
    state_device = next(t.device for key, t in slot.state.items() if key.startswith(moments))
    if gradient.layout is not torch.strided:
        return f"its gradient is sparse ({gradient.layout}); create the embedding with sparse=False"
    if gradient.dtype not in (p.dtype, torch.float32):
        return (
            f"its gradient has dtype {gradient.dtype}; "
            f"allowed are {p.dtype} (the parameter's) and torch.float32"
        )
    if not p.device == gradient.device == state_device:
        return (
            f"the parameter is on {p.device}, its gradient on {gradient.device}, its state on "
            f"{state_device}; move the model before its optimizer is built"
        )
    if not p.shape == gradient.shape == layout.shape:
        return (
            f"its shape is {tuple(p.shape)}, its gradient's {tuple(gradient.shape)}, its state was "
            f"made for {layout.shape}; build a new optimizer for a model of another shape"
        )
    return parameter_problem(p) or ""
