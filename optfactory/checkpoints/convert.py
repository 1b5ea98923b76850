"""From any stored width, block grid and map to any other, losing nothing where nothing must be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from optfactory.checkpoints.records import Quantized, Record, StoredState
from optfactory.rules.language import StateSpec
from optfactory.rules.options import DEFAULT_OPTIONS, KernelOptions
from optfactory.state import codec
from optfactory.state.codec import BlockGrid, CodeMap
from optfactory.state.layout import StateLayout
from optfactory.state.specs import EXTRA_KEYS

# Elements that are converted at once; temporary memory is some 40 bytes for each of them.
_CHUNK = 1 << 20


def decode(stored: StoredState) -> Tensor:
    """The values of a state: float32 where it was quantized, otherwise as it was stored."""
    if isinstance(stored, Tensor):
        return stored
    grid, shape = stored.grid, stored.codes.shape
    codes = stored.codes.reshape(grid.rows, grid.cols)
    scales = stored.scales.to(codes.device).reshape(grid.rows, -1)
    values = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    for part, blocks in _parts(grid):
        values[part] = codec.dequantize_blockwise(
            codes[part], scales[blocks], stored.qmap, grid.block_size
        )
    return values.reshape(shape)


def quantize(
    stored: StoredState,
    grid: BlockGrid,
    qmap: CodeMap,
    options: KernelOptions = DEFAULT_OPTIONS,
) -> Quantized:
    """A state in this grid and map.

    Codes stay as they are where the map is the same, up to last bits, and no block of the grid
    crosses a border of the stored ones: it then keeps the scale of the block that it lies in, and
    decodes to the same values. Otherwise the values are quantized anew.
    """
    if isinstance(stored, Quantized) and stored.qmap.name == qmap.name:
        inside = enclosing_blocks(grid, stored.grid)
        if inside is not None:
            scales = stored.scales.reshape(-1)
            return Quantized(stored.codes, scales[inside.to(scales.device)], grid, qmap)
    decoded = decode(stored)
    values = decoded.reshape(grid.rows, grid.cols)
    codes = torch.empty(values.shape, dtype=torch.uint8, device=values.device)
    scales = torch.empty(grid.scales_shape, dtype=torch.float32, device=values.device)
    scales = scales.reshape(grid.rows, -1)
    for part, blocks in _parts(grid):
        x = values[part].float()
        own = BlockGrid.of(tuple(x.shape), grid.block_size)
        codes[part], scales[blocks] = codec.quantize(x, qmap, own, options)
    return Quantized(codes.reshape(decoded.shape), scales, grid, qmap)


Slices = tuple[slice, slice]


def _parts(grid: BlockGrid) -> Iterator[tuple[Slices, Slices]]:
    """Rows and columns of whole blocks, of a bounded size, and their blocks' rows and columns."""
    size = grid.block_size
    width = max(1, _CHUNK // size)
    height = max(1, _CHUNK // max(1, grid.cols))
    for row in range(0, grid.rows, height):
        rows = slice(row, row + height)
        for block in range(0, -(-grid.cols // size), width):
            columns = slice(block * size, (block + width) * size)
            yield (rows, columns), (rows, slice(block, block + width))


def enclosing_blocks(inner: BlockGrid, outer: BlockGrid) -> Tensor | None:
    """The number of the outer block that holds each inner block; None if one lies in several."""
    begins = torch.arange(0, inner.cols, inner.block_size, dtype=torch.int64, device="cpu")
    lasts = (begins + inner.block_size).clamp_max(inner.cols) - 1
    rows = torch.arange(inner.rows, dtype=torch.int64, device="cpu")[:, None] * inner.cols
    first, last = _block_of(rows + begins, outer), _block_of(rows + lasts, outer)
    return first.reshape(-1) if torch.equal(first, last) else None


def _block_of(elements: Tensor, grid: BlockGrid) -> Tensor:
    per_row = -(-grid.cols // grid.block_size)
    return elements // grid.cols * per_row + elements % grid.cols // grid.block_size


def write(layout: StateLayout, record: Record, live: Mapping[str, Tensor]) -> None:
    """Write a checked record into a parameter's live state, which stays where it is."""
    live["step"].copy_(record.step)
    for key in live.keys() & set(EXTRA_KEYS):
        stored_extra = record.extras.get(key)
        if stored_extra is not None and stored_extra.dtype == live[key].dtype:
            live[key].copy_(stored_extra)
        else:
            live[key].zero_()
    states = dict(record.states)
    if layout.quantized:
        states = {state.name: stored for state, stored in _finite(layout.rule.states, states)}
    for state, own in layout.stored:
        stored, keys = states[state.name], own.keys(state)
        if not own.scaled:
            live[keys[0]].copy_(decode(stored))
            continue
        quantized = quantize(stored, layout.grid, own.map(state, layout.options), layout.options)
        live[keys[0]].copy_(own.pack(quantized.codes, live[keys[0]].shape))
        scales = live[keys[1]]
        scales.copy_(quantized.scales.reshape(scales.shape))


def _finite(
    specs: tuple[StateSpec, ...], states: Mapping[str, StoredState]
) -> list[tuple[StateSpec, StoredState]]:
    """States to quantize, where an element that is not finite starts afresh in all of them.

    As in a step: a momentum that outlived its second moment would make a huge step.
    """
    stored = [v.float() for v in states.values() if isinstance(v, Tensor)]
    if all(map(_is_finite, stored)):
        return [(spec, states[spec.name]) for spec in specs]
    finite = [v.isfinite() for v in stored]
    everywhere = torch.stack([mask.cpu() for mask in finite]).all(dim=0)
    values = {spec: decode(states[spec.name]) for spec in specs}
    return [(spec, v.where(everywhere.to(v.device), 0.0)) for spec, v in values.items()]


def _is_finite(x: Tensor) -> bool:
    """Whether all of x is; extremes take one pass and no memory."""
    return x.numel() == 0 or all(bool(extreme.isfinite()) for extreme in x.aminmax())
