"""The bytes that must move: every formula behind a limit is in this module. Loads no torch.

Parameters p, gradients g and states s are counted in bytes of their dtypes. One pass reads p, g
and s and writes p and s:

    AdamW, Adam: (p + g + s) + (p + s)

A trust ratio needs the norms of a whole tensor before its first element can change, so that LAMB
reads everything twice:

    LAMB:        2 (p + g + s) + (p + s)

Bytes a parameter, with 8-bit state of 2 codes and 2 scales of 4 bytes per 256 elements:

    p and g    state     AdamW, Adam   LAMB
    float32    32 bits   28            44
    float32     8 bits   16.0625       26.09375
    16 bits    32 bits   22            34
    16 bits     8 bits   10.0625       16.09375
    16 bits    16 bits   14            22         (torch keeps states in p's dtype)

Tensors that fit the caches need not move at all: such steps may be faster than this limit.
"""

from __future__ import annotations


def step_bytes(parameters: int, gradients: int, states: int, passes: int) -> int:
    """Bytes that a step must move: `passes` (p + g + s) + (p + s)."""
    return passes * (parameters + gradients + states) + parameters + states


def update_bytes(elements: int) -> int:
    """Bytes of an in-place a = a*s + b in float32: a and b are read, a is written; 12 each."""
    return 12 * elements


def copy_bytes(size: int) -> int:
    """Bytes of a copy of `size` bytes: all are read and written."""
    return 2 * size


def seconds_at(bandwidth: float, size: float) -> float:
    """The least time for moving `size` bytes at `bandwidth` bytes a second."""
    return size / bandwidth
