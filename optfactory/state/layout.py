"""The state of one parameter: which tensors it has, of what shape, and in how many bits.

Keys are flat and speak PyTorch's names: `step` (float64, as float32 would stand still at 2^24),
then per state `exp_avg` (float32 or bfloat16), or codes and float32 scales of blocks, such as
`exp_avg_q8` (uint8) with `exp_avg_absmax`: see `optfactory.state.codecs`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from optfactory.config.schema import OptimizerConfig
from optfactory.errors import StateError
from optfactory.matrix.stacks import neurons_of
from optfactory.memory import placement
from optfactory.rules.formats import block_size_of
from optfactory.rules.language import StateSpec, UpdateRule
from optfactory.rules.options import CLIP_HISTORY, KernelOptions
from optfactory.sharding.dtensors import Sharding
from optfactory.state.codec import BlockGrid, CodeMap
from optfactory.state.codecs import FLOAT32, Codec, codec_of
from optfactory.state.pieces import Piece
from optfactory.state.specs import (
    EXTRA_KEYS,
    HISTORY_KEY,
    KEPT_KEYS,
    NEURONS_KEY,
    Extents,
    TensorSpec,
    kept_beside,
)


@dataclass(frozen=True)
class StateLayout:
    """How the state of one parameter is stored.

    Attributes:
        shape: the parameter's (global) shape.
        rule: the update rule whose states these are.
        grid: the block grid of the parameter.
        codecs: how each of the states is stored.
        reason: why some are 32-bit where the config says less; else empty.
        unpaged: why not, where `is_paged` is true and its state is not paged; else empty.
        options: what kernels do with it around the rule.
        device_step: whether the step counter is on the parameter's device.
        tensors: every state tensor by its key.
        piece: what this process holds of a sharded parameter; None where that is all of it.
    """

    shape: tuple[int, ...]
    rule: UpdateRule
    grid: BlockGrid
    codecs: tuple[Codec, ...]
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
        if not layout.reason:
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
        grid = BlockGrid.of(shape, block_size_of(rule, group), flat=flat, whole=whole)
        codecs, reason = _codecs(rule, group, shape, grid, sharding)
        piece = None
        if sharding is not None:
            blocks = any(codec.scaled for codec in codecs)
            piece = Piece.of(sharding, grid, blocks=blocks, tensor_wise=whole)
        options = KernelOptions.of(
            group,
            [codec.formats[s.signed] for s, codec in zip(rule.states, codecs, strict=True)],
            rounds=dtype.itemsize < 4,
            cuts_blocks=piece is not None and bool(piece.cut),
        )
        numel = grid.rows * grid.cols if piece is None else piece.box.numel
        where, unpaged = placement.place_for(numel, device, group["is_paged"], group["page_memory"])
        device_step = bool(group["capturable"])
        tensors = {"step": TensorSpec(torch.float64, (), on_device=device_step)}
        extents = Extents.of(shape, grid, piece)
        for state, codec in zip(rule.states, codecs, strict=True):
            tensors |= codec.tensors(state, options, where, extents)
        if options.clips:
            tensors[HISTORY_KEY] = TensorSpec(torch.float32, (CLIP_HISTORY,))
        tensors |= kept_beside(options.rounding, dtype, extents.elements, where, sharding)
        neurons = None if rule.transform is None else neurons_of(shape, group)
        if neurons is not None:
            tensors[NEURONS_KEY] = TensorSpec(torch.float32, neurons)
        return cls(shape, rule, grid, codecs, reason, unpaged, options, device_step, tensors, piece)

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
    def quantized(self) -> bool:
        """Whether there are states that are codes of blocks which share scales."""
        return any(codec.scaled for codec in self.codecs)

    @property
    def bits(self) -> int | str:
        """The width of the states' elements; all of them, as in ``8/16``, where they differ."""
        widths = list(dict.fromkeys(codec.bits for codec in self.codecs)) or [32]
        return widths[0] if len(widths) == 1 else "/".join(map(str, widths))

    @property
    def stored(self) -> list[tuple[StateSpec, Codec]]:
        """Each state, and how it is stored."""
        return list(zip(self.rule.states, self.codecs, strict=True))

    @property
    def formats(self) -> tuple[str, ...]:
        """What kernels call the codecs of the states."""
        return tuple(codec.formats[state.signed] for state, codec in self.stored)

    @property
    def codes(self) -> list[CodeMap]:
        """What the codes of states mean that have some."""
        return [c.map(state, self.options) for state, c in self.stored if c.scaled]

    @property
    def kept_key(self) -> str:
        """The key of what is kept beside a 16-bit parameter; empty if nothing is."""
        return next((key for key in KEPT_KEYS if key in self.tensors), "")

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


def _codecs(
    rule: UpdateRule,
    group: Mapping[str, Any],
    shape: tuple[int, ...],
    grid: BlockGrid,
    sharding: Sharding | None,
) -> tuple[tuple[Codec, ...], str]:
    """How each state is stored, and why some are not as the group says."""
    asked = [codec_of(group, state) for state in rule.states]
    least = group["min_8bit_size"]
    reasons = [codec.why_not(shape, grid, least, sharding) for codec in asked]
    found = [FLOAT32 if why else codec for codec, why in zip(asked, reasons, strict=True)]
    none = "" if asked or group["optim_bits"] == 32 else f"the rule '{rule.name}' keeps no state"
    return tuple(found), next(filter(None, reasons), none)
