"""The quantization maps on the device, as kernels/cuda/maps.cuh declares them."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from optfactory.state.lines import Lines
from optfactory.state.quantmap import QuantizationMap, map_for


@cache
def map_tables(device: torch.device, kind: str) -> tuple[Tensor, ...]:
    """The signed and the unsigned map as the structs of kernels/cuda/maps.cuh."""
    maps = (map_for(True, kind), map_for(False, kind))
    tables = [_line_struct(qmap.lines) if qmap.lines else _table_struct(qmap) for qmap in maps]
    return tuple(torch.from_numpy(table).to(device) for table in tables)


def _line_struct(lines: Lines) -> np.ndarray:
    slopes, offsets, _, steps = lines.tables()
    values = np.array([slopes, offsets], dtype=np.float32).T
    octaves = np.array(lines.octaves(), dtype=np.int32)
    floats = np.concatenate([values.ravel(), np.array(steps, dtype=np.float32)])
    return np.concatenate([floats.view(np.int32), octaves])


def _table_struct(qmap: QuantizationMap) -> np.ndarray:
    keys = qmap.keys if qmap.signed else qmap.keys[: len(qmap.keys) // 2]
    values = np.array(qmap.values, dtype=np.float32).view(np.int32)
    return np.concatenate([values, np.array(keys, dtype=np.int32)])
