"""The state of one parameter: which tensors it has, of what shape, and in how many bits.

Keys are flat and speak PyTorch's names: `step` (float64, as float32 would stand still at 2^24),
then per state `exp_avg` (float32), or `exp_avg_q8` (uint8 codes) with `exp_avg_absmax` (float32
scales).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from optfactory.config.schema import OptimizerConfig
from optfactory.errors import StateError
from optfactory.matrix.stacks import neurons_of
from optfactory.memory import placement
from optfactory.memory.presence import memory_problem
from optfactory.rules.language import StateSpec, UpdateRule
from optfactory.rules.options import CLIP_HISTORY, KernelOptions
from optfactory.sharding.dtensors import Sharding
from optfactory.state.codec import BlockGrid
from optfactory.state.pieces import Piece
from optfactory.state.quantmap import map_for

# A row shorter than this would spend more on scales than 8 bits save.
MIN_8BIT_ROW = 64


# Squared gradient norms of percentile clipping, what storing 16-bit parameters lost (Kahan), and
# second moments of the rows of directions that are made of matrices.
HISTORY_KEY = "gnorm_vec"
LOSS_KEY = "compensation"
NEURONS_KEY = "neuron_second_moment"
EXTRA_KEYS = (HISTORY_KEY, LOSS_KEY, NEURONS_KEY)


def codes_key(state: StateSpec) -> str:
    """The key of a quantized state's codes."""
    return f"{state.name}_q8"


def absmax_key(state: StateSpec) -> str:
    """The key of a quantized state's scales."""
    return f"{state.name}_absmax"


@dataclass(frozen=True)
class TensorSpec:
    """One state tensor: dtype, shape, where it lives and what it is filled with at first.

    With `on_device` it is kept on the parameter's device, otherwise on the CPU. Where a process
    holds a part of it, `shape` is the part's, and `sharding` says of what.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    where: str = placement.RESIDENT
    fill: float = field(default=0, compare=False)
    on_device: bool = True
    sharding: Sharding | None = None

    @property
    def nbytes(self) -> int:
        """Size in bytes, of what is here."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def global_nbytes(self) -> int:
        """Size in bytes of the whole, as one process has it."""
        shape = self.shape if self.sharding is None else self.sharding.shape
        return math.prod(shape) * self.dtype.itemsize

    def problem(self, value: object) -> str:
        """Why a value cannot be this state tensor; empty if it can."""
        if not isinstance(value, Tensor):
            return f"expected a tensor, got {type(value).__name__}"
        if value.dtype != self.dtype:
            return f"expected {self.dtype}, got {value.dtype}"
        if tuple(value.shape) != self.shape:
            return f"expected shape {self.shape}, got {tuple(value.shape)}"
        if value.layout is not torch.strided or value.device.type == "meta":
            return f"expected dense data, got layout {value.layout} on device '{value.device}'"
        if hasattr(value, "device_mesh"):
            return "is a DTensor; sharded state is not supported yet"
        if is_traceable_wrapper_subclass(value):
            return f"expected a plain tensor, got {type(value).__name__}"
        return memory_problem(value)

    def home(self, device: torch.device) -> torch.device:
        """Where the tensor is for a parameter on this device."""
        follows = self.on_device and self.where != placement.PINNED
        return device if follows else torch.device("cpu")

    def allocate(self, device: torch.device, page_dir: str | None) -> Tensor:
        """A fresh tensor for a parameter on this device."""
        home = device if self.on_device else torch.device("cpu")
        with torch.inference_mode(False):  # or a step outside could not write to it
            return placement.allocate(self.shape, self.dtype, home, self.where, page_dir, self.fill)


@dataclass(frozen=True)
class StateLayout:
    """How the state of one parameter is stored.

    Attributes:
        shape: the parameter's (global) shape.
        rule: the update rule whose states these are.
        grid: the block grid of the parameter.
        quantized: whether the states are 8-bit.
        reason: why not, where `optim_bits` is 8 and they are 32-bit; else empty.
        unpaged: why not, where `is_paged` is true and its state is not paged; else empty.
        options: what kernels do with it around the rule.
        device_step: whether the step counter is on the parameter's device.
        tensors: every state tensor by its key.
        piece: what this process holds of a sharded parameter; None where that is all of it.
    """

    shape: tuple[int, ...]
    rule: UpdateRule
    grid: BlockGrid
    quantized: bool
    reason: str
    unpaged: str
    options: KernelOptions
    device_step: bool
    tensors: Mapping[str, TensorSpec]
    piece: Piece | None = None

    @classmethod
    def of(
        cls,
        shape: tuple[int, ...],
        device: torch.device,
        dtype: torch.dtype,
        config_class: type[OptimizerConfig],
        group: Mapping[str, Any],
        sharding: Sharding | None = None,
    ) -> StateLayout:
        """The layout for a parameter of this global shape under a group's hyperparameters.

        A parameter that stays at 32 bits has the rule of 32 bits. Widths and blocks follow from the
        global shape alone, whatever part of it a process holds.
        """
        rule = config_class.rule(group)
        layout = cls.of_rule(shape, device, dtype, rule, group, sharding)
        if layout.quantized or group["optim_bits"] == 32:
            return layout
        wide = config_class.rule({**group, "optim_bits": 32})
        if wide == rule:
            return layout
        return cls.of_rule(shape, device, dtype, wide, group, sharding)

    @classmethod
    def of_rule(
        cls,
        shape: tuple[int, ...],
        device: torch.device,
        dtype: torch.dtype,
        rule: UpdateRule,
        group: Mapping[str, Any],
        sharding: Sharding | None,
    ) -> StateLayout:
        """As `of`, with a rule of the caller's."""
        whole = not group["block_wise"]
        flat = group["compat"] == "bitsandbytes"
        grid = BlockGrid.of(shape, group["block_size"], flat=flat, whole=whole)
        reason = _why_32_bits(rule, grid, group["min_8bit_size"])
        quantized = group["optim_bits"] == 8 and not reason
        piece = None
        if sharding is not None:
            piece = Piece.of(sharding, grid, blocks=quantized, tensor_wise=whole)
        options = KernelOptions.of(
            group,
            quantized,
            rounds=dtype.itemsize < 4,
            cuts_blocks=piece is not None and bool(piece.cut),
        )
        numel = grid.rows * grid.cols if piece is None else piece.box.numel
        where, unpaged = placement.place_for(numel, device, group["is_paged"], group["page_memory"])
        device_step = bool(group["capturable"])
        tensors = {
            "step": TensorSpec(torch.float64, (), on_device=device_step),
            **_state_tensors(rule, options, quantized, where, _Extents.of(shape, grid, piece)),
        }
        if options.clips:
            tensors[HISTORY_KEY] = TensorSpec(torch.float32, (CLIP_HISTORY,))
        if options.rounding == "kahan":
            own = shape if piece is None else piece.box.sizes
            tensors[LOSS_KEY] = TensorSpec(dtype, own, sharding=sharding)
        neurons = None if rule.transform is None else neurons_of(shape, group)
        if neurons is not None:
            tensors[NEURONS_KEY] = TensorSpec(torch.float32, neurons)
        if group["optim_bits"] == 32:
            reason = ""
        return cls(
            shape, rule, grid, quantized, reason, unpaged, options, device_step, tensors, piece
        )

    def unsharded(self) -> StateLayout:
        """The layout of the whole parameter on one process, in resident memory."""
        tensors = {
            key: replace(
                spec,
                shape=spec.shape if spec.sharding is None else spec.sharding.shape,
                where=placement.RESIDENT,
                sharding=None,
            )
            for key, spec in self.tensors.items()
        }
        options = replace(self.options, cuts_blocks=False)
        return replace(self, piece=None, tensors=tensors, options=options)

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The shape of what this process holds of the parameter."""
        return self.shape if self.piece is None else self.piece.box.sizes

    @property
    def local_grid(self) -> BlockGrid:
        """The blocks of what this process holds, unless some are cut: see `Piece.fragments`."""
        return self.grid if self.piece is None else self.piece.grid

    def allocate(self, device: torch.device, page_dir: str | None) -> dict[str, Tensor]:
        """Fresh state: step 0, and what states begin with."""
        return {key: spec.allocate(device, page_dir) for key, spec in self.tensors.items()}

    def check(self, name: str, state: Mapping[str, Tensor], device: torch.device) -> None:
        """Refuse state tensors that are not what this layout allocates for a parameter there.

        Raises:
            StateError: names the parameter and the state; a kernel would write outside of it.
        """
        if not self.tensors.keys() <= state.keys():
            raise StateError(
                f"the state of {name} has the keys {list(state)}, expected {list(self.tensors)}"
            )
        for key, spec in self.tensors.items():
            problem = spec.problem(state[key])
            if not problem and not state[key].is_contiguous():
                problem = "expected a contiguous tensor"
            home = spec.home(device)
            if not problem and state[key].device != home:
                problem = f"expected device '{home}', got '{state[key].device}'"
            if problem:
                raise StateError(f"the state '{key}' of {name}: {problem}")

    def holds_state_of(self, other: StateLayout) -> bool:
        """Whether state that was made for this layout is what another one reads.

        What options keep may be there in one of them alone.
        """
        both = (self, other)
        optional = (self.tensors.keys() ^ other.tensors.keys()) & set(EXTRA_KEYS)
        specs = [{k: v for k, v in x.tensors.items() if k not in optional} for x in both]
        codes = [(x.grid, x.options.symmetric_map) if x.quantized else None for x in both]
        return (
            specs[0] == specs[1] and codes[0] == codes[1] and self.rule.states == other.rule.states
        )

    def homes(self, state: Mapping[str, Tensor], device: torch.device) -> set[torch.device]:
        """The devices of the state tensors that belong on the parameter's device."""
        specs = self.tensors.items()
        return {
            state[key].device
            for key, spec in specs
            if key in state and spec.home(device) == device and spec.shape
        }

    @property
    def where(self) -> str:
        """Where the large state tensors live."""
        return next(
            (spec.where for spec in self.tensors.values() if spec.shape), placement.RESIDENT
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all state tensors, of what is here."""
        return sum(spec.nbytes for spec in self.tensors.values())

    @property
    def global_nbytes(self) -> int:
        """Bytes of the whole parameter's state, as one process has it."""
        return sum(spec.global_nbytes for spec in self.tensors.values())


@dataclass(frozen=True)
class _Extents:
    """Shapes of elements and scales in this process, and of what tensor these are parts."""

    elements: tuple[int, ...]
    scales: tuple[int, ...]
    elements_of: Sharding | None
    scales_of: Sharding | None

    @classmethod
    def of(cls, shape: tuple[int, ...], grid: BlockGrid, piece: Piece | None) -> _Extents:
        if piece is None:
            return cls(shape, grid.scales_shape, None, None)
        return cls(piece.box.sizes, piece.scales.box.sizes, piece.sharding, piece.scales)


def _state_tensors(
    rule: UpdateRule, options: KernelOptions, quantized: bool, where: str, extents: _Extents
) -> dict[str, TensorSpec]:
    tensors = {}
    for state in rule.states:
        if quantized:
            qmap = map_for(state.signed, options.map_kind)
            code = qmap.one_code if state.fill else qmap.zero_code
            tensors[codes_key(state)] = TensorSpec(
                torch.uint8, extents.elements, where, code, sharding=extents.elements_of
            )
            tensors[absmax_key(state)] = TensorSpec(
                torch.float32, extents.scales, fill=state.fill, sharding=extents.scales_of
            )
        else:
            tensors[state.name] = TensorSpec(
                torch.float32, extents.elements, where, state.fill, sharding=extents.elements_of
            )
    return tensors


def _why_32_bits(rule: UpdateRule, grid: BlockGrid, min_8bit_size: int) -> str:
    numel = grid.rows * grid.cols
    if not rule.states:
        return f"the rule '{rule.name}' keeps no state"
    if numel < min_8bit_size:
        return f"{numel} elements, fewer than min_8bit_size ({min_8bit_size})"
    if grid.cols < MIN_8BIT_ROW:
        return f"rows of {grid.cols} elements, shorter than {MIN_8BIT_ROW}"
    return ""
