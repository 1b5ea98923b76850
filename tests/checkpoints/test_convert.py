"""Which blocks lie inside which, against a count element by element; conversion in parts."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optfactory.checkpoints.convert import decode, enclosing_blocks, quantize
from optfactory.state.codec import BlockGrid
from optfactory.state.quantmap import SIGNED
from tests.checkpoints.harness import CODECS, array, decoded, same
from tests.reference.quantization import assert_encodes


def owners(grid: BlockGrid) -> list[int]:
    """The block of every element, by walking over all of them."""
    blocks, found = -1, []
    for _ in range(grid.rows):
        for column in range(grid.cols):
            blocks += column % grid.block_size == 0
            found.append(blocks)
    return found


@given(
    st.integers(1, 6),
    st.integers(1, 40),
    st.integers(1, 50),
    st.integers(1, 50),
    st.booleans(),
    st.booleans(),
)
@settings(deadline=None, max_examples=400)
def test_enclosing_blocks(
    rows: int, cols: int, inner: int, outer: int, flat_inner: bool, flat_outer: bool
) -> None:
    grids = []
    for size, flat in ((inner, flat_inner), (outer, flat_outer)):
        shape = (rows * cols,) if flat else (rows, cols)
        grids.append(BlockGrid.of(shape, size))
        assert len(set(owners(grids[-1]))) == math.prod(grids[-1].scales_shape)
    holders: dict[int, set[int]] = {}
    for block, holder in zip(owners(grids[0]), owners(grids[1]), strict=True):
        holders.setdefault(block, set()).add(holder)
    found = enclosing_blocks(*grids)
    if all(len(several) == 1 for several in holders.values()):
        assert found is not None
        assert [{number} for number in found.tolist()] == list(holders.values())
    else:
        assert found is None


@pytest.mark.parametrize("shape", [(7, 300), (3, 1000), (5000,), (0,), (0, 4), (1, 1)])
@pytest.mark.parametrize("block", [64, 256])
def test_conversion_in_parts_is_conversion_as_a_whole(
    shape: tuple[int, ...], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optfactory.checkpoints.convert._CHUNK", 600)
    values = torch.randn(shape)
    quantized = quantize(values, BlockGrid.of(shape, block), SIGNED)
    codes, scales = quantized.codes.numpy(), quantized.scales.numpy()
    assert_encodes(codes, scales, array(values), CODECS["exp_avg"], block)
    assert same(array(decode(quantized)), decoded(codes, scales, "exp_avg", block=block))
