"""The layout that this library writes; `optfactory.state.layout` says what its keys are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from optfactory.checkpoints.fields import Fields
from optfactory.checkpoints.records import GroupRecord, Quantized, Record, StoredState
from optfactory.config.fields import BLOCK_SIZES
from optfactory.errors import UnknownOptimizerError
from optfactory.registry import get_optimizer_info
from optfactory.rules.formats import halved
from optfactory.rules.language import StateSpec
from optfactory.rules.options import CLIP_HISTORY, KernelOptions
from optfactory.state import codec
from optfactory.state.codec import BlockGrid
from optfactory.state.codecs import ALL, FOUR_BIT, SUFFIXES, UNSCALED
from optfactory.state.layout import StateLayout
from optfactory.state.specs import (
    HISTORY_KEY,
    LOSS_KEY,
    LOW_KEY,
    MASTER_KEY,
    NEURONS_KEY,
    pairs_of,
)

FORMAT_VERSION = 1


class OwnLayout:
    """Reads checkpoints of this library, of any width, placement and block size."""

    def read_group(self, saved: Mapping[str, Any]) -> GroupRecord:
        """The values of a group; problems if its format, name or blocks are not known here."""
        problems = _format_problems(saved.get("format_version"))
        family = ""
        if not problems:
            problems = _block_size_problems(saved)
            try:
                family = get_optimizer_info(str(saved.get("optimizer"))).family
            except UnknownOptimizerError as error:
                problems.append(f"optimizer: {error}")
        return GroupRecord(family, saved, problems)

    def read_entries(
        self, fields: Fields, layout: StateLayout, saved: Mapping[str, Any]
    ) -> Record | None:
        """The states of a parameter, of the width in which they were saved."""
        of_four = any(FOUR_BIT.keys(state)[0] in fields for state in layout.rule.states)
        grid = BlockGrid.of(
            layout.shape,
            halved(saved["block_size"]) if of_four else saved["block_size"],
            flat=saved.get("compat") == "bitsandbytes",
            whole=saved.get("block_wise") is False,
        )
        kind = KernelOptions(
            symmetric_map=saved.get("signed_map") == "symmetric",
            bitsandbytes=saved.get("compat") == "bitsandbytes",
        )
        states = {
            state.name: _read(fields, state, grid, kind, layout) for state in layout.rule.states
        }
        return Record.of(fields.step(), states, read_extras(fields, layout))


def read_extras(fields: Fields, layout: StateLayout) -> dict[str, Tensor | None]:
    """What options of the run that wrote the checkpoint kept."""
    known = {
        HISTORY_KEY: ((CLIP_HISTORY,), (torch.float32,)),
        LOSS_KEY: (layout.shape, (torch.bfloat16, torch.float16)),
        LOW_KEY: (layout.shape, (torch.int16,)),
        MASTER_KEY: (layout.shape, (torch.float32,)),
    }
    found = {key: fields.tensor(key, *facts) for key, facts in known.items() if key in fields}
    neurons = layout.tensors.get(NEURONS_KEY)
    if neurons is None:  # how many there were is not known then
        fields.ignore(NEURONS_KEY)
    elif NEURONS_KEY in fields:
        spec = StateSpec(NEURONS_KEY, signed=False)
        found[NEURONS_KEY] = fields.state(NEURONS_KEY, spec, neurons.shape, (neurons.dtype,))
    return found


def live_record(layout: StateLayout, state: Mapping[str, Tensor]) -> Record:
    """A parameter's live state, or what this process holds of it.

    It is float32 unless it is in blocks, and those are whole.
    """
    states: dict[str, StoredState] = {}
    for spec, own in layout.stored:
        keys, piece = own.keys(spec), layout.piece
        if not own.scaled:
            states[spec.name] = state[keys[0]].float()
            continue
        codes, scales = own.unpack(state[keys[0]], layout.local_shape), state[keys[1]]
        meaning = own.map(spec, layout.options)
        if piece is not None and piece.cut:
            scale = piece.element_scales(scales).to(codes.device)
            states[spec.name] = codec.decode(codes, scale, meaning)
        else:
            states[spec.name] = Quantized(codes, scales, layout.local_grid, meaning)
    return Record(state["step"], states)


def _format_problems(version: object) -> list[str]:
    if isinstance(version, bool) or not isinstance(version, int):
        got = "missing" if version is None else f"no number ({version!r})"
        return [f"format_version: {got}; the checkpoint was not written by optfactory"]
    if version > FORMAT_VERSION:
        return [
            f"format_version: {version} is newer than this optfactory reads ({FORMAT_VERSION}); "
            "update optfactory"
        ]
    return []


def _block_size_problems(saved: Mapping[str, Any]) -> list[str]:
    if "block_size" not in saved:
        return ["block_size: missing in the checkpoint"]
    size, allowed = saved["block_size"], BLOCK_SIZES
    if isinstance(size, bool) or not isinstance(size, int) or size not in allowed:
        return [f"block_size: expected one of {allowed}, got {size!r}"]
    return []


def _read(
    fields: Fields, state: StateSpec, grid: BlockGrid, kind: KernelOptions, layout: StateLayout
) -> StoredState | None:
    own = next((c for c in ALL if c.scaled and c.keys(state)[0] in fields), None)
    own = own or next((c for c in ALL if c.scaled and c.keys(state)[1] in fields), None)
    if own is None:
        if state.name not in fields:
            ends = ", ".join(f"{state.name}{end}" for end in SUFFIXES if end)
            fields.note(state.name, f"missing in the checkpoint, and so are {ends}")
            return None
        return fields.state(state.name, state, layout.shape, UNSCALED)
    keys = own.keys(state)
    shape = pairs_of(layout.shape).scales_shape if own.in_pairs else layout.shape
    elements = fields.tensor(keys[0], shape, (own.dtype,))
    scales = fields.scales(keys[1], grid.scales_shape)
    if elements is None or scales is None:
        return None
    return Quantized(own.unpack(elements, layout.shape), scales, grid, own.map(state, kind))
