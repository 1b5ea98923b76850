"""How elements of state are stored, by width.

| bits | in memory | rounding |
|---|---|---|
| 32 | float32 | none |
| 16 | bfloat16 | at random: half a unit is 0.2 to 0.4 %, and slow averages change by less |
| 8 | uint8 codes of a map, and float32 scales of blocks (`codec`) | as `state_rounding` says |

A tensor is 16- or 8-bit as a whole, or stays at 32 bits for a reason that reports give.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from optfactory.rules.language import StateSpec, UpdateRule
from optfactory.rules.options import KernelOptions
from optfactory.state.codec import BlockGrid
from optfactory.state.quantmap import map_for
from optfactory.state.specs import Extents, TensorSpec, absmax_key, codes_key

# A row shorter than this would spend more on scales than 8 bits save.
MIN_8BIT_ROW = 64


@dataclass(frozen=True)
class Codec:
    """How the elements of a parameter's states are stored.

    Attributes:
        name: how kernels are labelled.
        bits: of an element.
        dtype: of what stands for an element.
        scaled: whether elements of a block share a scale.
    """

    name: str
    bits: int
    dtype: torch.dtype
    scaled: bool = False

    def elements_key(self, state: StateSpec) -> str:
        """The key of the tensor that has an entry for each element."""
        return codes_key(state) if self.scaled else state.name

    def why_not(self, rule: UpdateRule, grid: BlockGrid, min_8bit_size: int) -> str:
        """Why a parameter keeps 32-bit state instead; empty if it does not."""
        if self.bits == 32:
            return ""
        if not rule.states:
            return f"the rule '{rule.name}' keeps no state"
        return _why_no_blocks(grid, min_8bit_size) if self.scaled else ""

    def tensors(
        self, state: StateSpec, options: KernelOptions, where: str, extents: Extents
    ) -> dict[str, TensorSpec]:
        """The tensors of a state, by their keys."""
        fill: float = state.fill
        if self.scaled:
            qmap = map_for(state.signed, options.map_kind)
            fill = qmap.one_code if state.fill else qmap.zero_code
        elements = TensorSpec(
            self.dtype, extents.elements, where, fill, sharding=extents.elements_of
        )
        found = {self.elements_key(state): elements}
        if self.scaled:
            found[absmax_key(state)] = TensorSpec(
                torch.float32, extents.scales, fill=state.fill, sharding=extents.scales_of
            )
        return found


FLOAT32 = Codec("32bit", 32, torch.float32)
BFLOAT16 = Codec("16bit", 16, torch.bfloat16)
EIGHT_BIT = Codec("8bit", 8, torch.uint8, scaled=True)

# What may stand for elements by itself.
UNSCALED = (FLOAT32.dtype, BFLOAT16.dtype)

CODECS = {codec.bits: codec for codec in (EIGHT_BIT, BFLOAT16, FLOAT32)}


def _why_no_blocks(grid: BlockGrid, min_8bit_size: int) -> str:
    numel = grid.rows * grid.cols
    if numel < min_8bit_size:
        return f"{numel} elements, fewer than min_8bit_size ({min_8bit_size})"
    if grid.cols < MIN_8BIT_ROW:
        return f"rows of {grid.cols} elements, shorter than {MIN_8BIT_ROW}"
    return ""
