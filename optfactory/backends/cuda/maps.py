"""The quantization maps on the device, as kernels/cuda/maps.cuh declares them."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from optfactory.state.lines import Lines
from optfactory.state.positions import positions_of
from optfactory.state.quantmap import QuantizationMap, map_for


@cache
def map_tables(device: torch.device, kind: str, random: bool) -> tuple[Tensor, ...]:
    """The signed and the unsigned map as the structs of kernels/cuda/maps.cuh.

    Args:
        random: for kernels that round codes at random.
    """
    maps = (map_for(True, kind), map_for(False, kind))
    tables = [
        _line_struct(qmap.lines, random) if qmap.lines else _table_struct(qmap) for qmap in maps
    ]
    return tuple(torch.from_numpy(table).to(device) for table in tables)


def _line_struct(lines: Lines, random: bool) -> np.ndarray:
    slopes, offsets, _, steps = lines.tables()
    octaves, ends = lines.octaves(), _pairs()
    if random:
        positions = positions_of(lines)
        _, steps, starts, bends = positions.tables()
        octaves, ends = positions.octaves(), _pairs(starts, bends)
    parts = (
        _pairs(slopes, offsets),
        np.array(steps, np.float32),
        np.array(octaves, np.int32),
        ends,
    )
    return np.concatenate([part.view(np.int32) for part in parts])


def _pairs(*columns: tuple[float, ...]) -> np.ndarray:
    """Rows of numbers, one after the other."""
    return np.array(columns, dtype=np.float32).T.ravel()


def _table_struct(qmap: QuantizationMap) -> np.ndarray:
    keys = qmap.keys if qmap.signed else qmap.keys[: len(qmap.keys) // 2]
    values = np.array(qmap.values, dtype=np.float32).view(np.int32)
    return np.concatenate([values, np.array(keys, dtype=np.int32)])
