"""How elements of state are stored.

| codec | in memory | rounding |
|---|---|---|
| 32bit | float32 | none |
| 16bit | bfloat16 | at random: half a unit is 0.2 to 0.4 %, and slow averages change by less |
| 8bit | codes of a dynamic map, float32 scales of blocks (`quantmap`) | as `state_rounding` says |
| fp8 | codes of 8-bit floats, float32 scales of blocks (`minifloats`) | at random |
| 4bit | two codes a byte of 4-bit floats, float32 scales of blocks (`minifloats`) | at random |

Each state has one of them, or stays at 32 bits for a reason that reports give.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optfactory.rules.formats import FORMATS, width_of_state
from optfactory.rules.language import StateSpec
from optfactory.rules.options import KernelOptions
from optfactory.sharding.dtensors import Sharding
from optfactory.state.codec import BlockGrid, CodeMap
from optfactory.state.minifloats import MINIFLOATS, packed, unpacked
from optfactory.state.pieces import keeps_pairs
from optfactory.state.quantmap import map_for
from optfactory.state.specs import Extents, TensorSpec, pairs_of

# A row shorter than this would spend more on scales than 8 bits save.
MIN_8BIT_ROW = 64


@dataclass(frozen=True)
class Codec:
    """How the elements of a state are stored.

    Attributes:
        name: how names and reports call it.
        bits: of an element.
        dtype: of what stands for an element.
        formats: how kernels call it, by whether a state is signed.
        suffixes: of the keys of elements and of scales; without the second there are no scales.
        always_random: whether a step rounds at random whatever `state_rounding` says.
    """

    name: str
    bits: int
    dtype: torch.dtype
    formats: Mapping[bool, str]
    suffixes: tuple[str, ...] = ("",)
    always_random: bool = False

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def scaled(self) -> bool:
        """Whether elements of a block share a scale."""
        return len(self.suffixes) > 1

    def keys(self, state: StateSpec) -> tuple[str, ...]:
        """The keys of a state's tensors: its elements, and then its scales if there are some."""
        return tuple(f"{state.name}{suffix}" for suffix in self.suffixes)

    def map(self, state: StateSpec, options: KernelOptions) -> CodeMap:
        """What the codes of a state mean."""
        floats = MINIFLOATS.get(self.formats[state.signed])
        return floats or map_for(state.signed, options.map_kind)

    @property
    def in_pairs(self) -> bool:
        """Whether a byte holds two elements of a row."""
        return self.bits == 4

    def pack(self, codes: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
        """Codes, one for each element, as a tensor of this shape keeps them."""
        return packed(codes.reshape(*shape[:-1], -1)) if self.in_pairs else codes.reshape(shape)

    def unpack(self, stored: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The codes of a tensor whose elements have this shape."""
        return unpacked(stored).reshape(shape) if self.in_pairs else stored

    def why_not(
        self, shape: tuple[int, ...], grid: BlockGrid, min_8bit_size: int, sharding: Sharding | None
    ) -> str:
        """Why a state is stored in 32 bits instead; empty if it is not."""
        if self.scaled and (reason := _why_no_blocks(grid, min_8bit_size)):
            return reason
        pairs = pairs_of(shape)
        if self.in_pairs and pairs.cols % 2:
            return f"rows of {pairs.cols} elements, an odd number, and a byte holds two"
        if self.in_pairs and sharding is not None and not keeps_pairs(sharding, pairs):
            return "shards of an odd number of elements, and a byte holds two"
        return ""

    def tensors(
        self, state: StateSpec, options: KernelOptions, where: str, extents: Extents
    ) -> dict[str, TensorSpec]:
        """The tensors of a state, by their keys."""
        fill: float = state.fill
        if self.scaled:
            codes = self.map(state, options)
            fill = codes.one_code if state.fill else codes.zero_code
            fill = 17 * fill if self.in_pairs else fill  # of both
        shape, whole = extents.elements, extents.elements_of
        if self.in_pairs:
            shape, whole = extents.pairs, extents.pairs_of
        elements = TensorSpec(self.dtype, shape, where, fill, sharding=whole)
        found = {self.keys(state)[0]: elements}
        if self.scaled:
            found[self.keys(state)[1]] = TensorSpec(
                torch.float32, extents.scales, fill=state.fill, sharding=extents.scales_of
            )
        return found


FLOAT32 = Codec("32bit", 32, torch.float32, FORMATS["32bit"])
BFLOAT16 = Codec("16bit", 16, torch.bfloat16, FORMATS["16bit"], always_random=True)
EIGHT_BIT = Codec("8bit", 8, torch.uint8, FORMATS["8bit"], ("_q8", "_absmax"))
FP8 = Codec("fp8", 8, torch.uint8, FORMATS["fp8"], ("_fp8", "_scale"), True)
FOUR_BIT = Codec("4bit", 4, torch.uint8, FORMATS["4bit"], ("_q4", "_scale"), True)

ALL = (FOUR_BIT, EIGHT_BIT, FP8, BFLOAT16, FLOAT32)
_BY_WIDTH = {codec.name: codec for codec in ALL}

# What may stand for elements by itself.
UNSCALED = (FLOAT32.dtype, BFLOAT16.dtype)

# All endings of keys.
SUFFIXES = tuple(dict.fromkeys(suffix for codec in ALL for suffix in codec.suffixes))


def codec_of(group: Mapping[str, Any], state: StateSpec) -> Codec:
    """How a param group stores a state, where nothing speaks against it."""
    return _BY_WIDTH[width_of_state(group, state)]


def _why_no_blocks(grid: BlockGrid, min_8bit_size: int) -> str:
    numel = grid.rows * grid.cols
    if numel < min_8bit_size:
        return f"{numel} elements, fewer than min_8bit_size ({min_8bit_size})"
    if grid.cols < MIN_8BIT_ROW:
        return f"rows of {grid.cols} elements, shorter than {MIN_8BIT_ROW}"
    return ""
