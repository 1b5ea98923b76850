"""8-bit state in the portable backend: in blocks that are all here, or with scales for more."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from optfactory.rules.language import StateSpec
from optfactory.state.codec import (
    dequantize,
    dequantize_elements,
    element_needs,
    encode_elements,
    quantize,
)
from optfactory.state.layout import absmax_key, codes_key
from optfactory.state.quantmap import QuantizationMap, map_for
from optfactory.step.slots import Slot


def decoded(slot: Slot, state: StateSpec) -> Tensor:
    """The float32 values of a state."""
    codes, scales = slot.state[codes_key(state)], slot.state[absmax_key(state)]
    if slot.layout.options.cuts_blocks:
        return dequantize_elements(codes, _of_elements(slot, scales), _map(slot, state))
    return dequantize(codes, scales, _map(slot, state), slot.layout.local_grid)


def needed_scales(slot: Slot, values: Mapping[str, Tensor]) -> Tensor:
    """The scales that the elements in this process need, of the tensor or of each of its blocks.

    Returns:
        float32 [states, scales in this process]; 0 where no element is.
    """
    rows = []
    for state in slot.layout.rule.states:
        needs = element_needs(values[state.name], _map(slot, state), slot.layout.options)
        most = torch.zeros_like(slot.state[absmax_key(state)]).reshape(-1)
        if slot.layout.options.tensor_wise:
            index = torch.zeros(needs.numel(), dtype=torch.int64, device=needs.device)
        else:
            index = _blocks(slot, needs.device)
        rows.append(most.scatter_reduce(0, index, needs.reshape(-1), "amax"))
    return torch.stack(rows)


def encode(slot: Slot, state: StateSpec, x: Tensor, scales: Tensor | None) -> None:
    """Store finite values.

    Args:
        scales: those of `needed_scales`, completed over the processes; None makes them here.
    """
    options, qmap = slot.layout.options, _map(slot, state)
    codes, absmax = slot.state[codes_key(state)], slot.state[absmax_key(state)]
    if scales is None:
        new_codes, scales = quantize(x, qmap, slot.layout.local_grid, options)
    else:
        own = scales if options.tensor_wise else _of_elements(slot, scales)
        new_codes = encode_elements(x, own, qmap, options)
    codes.copy_(new_codes)
    absmax.copy_(scales.view(absmax.shape))


def _of_elements(slot: Slot, scales: Tensor) -> Tensor:
    assert slot.layout.piece is not None
    return slot.layout.piece.element_scales(scales)


def _blocks(slot: Slot, device: torch.device) -> Tensor:
    """The block of each element among the scales in this process."""
    assert slot.layout.piece is not None
    _, counts, blocks, _ = slot.layout.piece.fragments.to(device).unbind(1)
    return blocks.repeat_interleave(counts)


def _map(slot: Slot, state: StateSpec) -> QuantizationMap:
    return map_for(state.signed, slot.layout.options.symmetric_map)
