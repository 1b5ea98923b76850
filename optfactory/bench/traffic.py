"""The bytes that must move: every formula behind a limit is in this module. Loads no torch.

Parameters p, gradients g and states s are counted in bytes of their dtypes. One pass reads p, g
and s and writes p and s:

    AdamW, Adam: (p + g + s) + (p + s)

A trust ratio needs the norms of a whole tensor before its first element can change, so that LAMB
reads everything twice:

    LAMB:        2 (p + g + s) + (p + s)

LARS needs those of parameter and gradient, for which no state is read:

    LARS:        (p + g) + (p + g + s) + (p + s)

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

# Bytes an element of the streams in float32 whose fastest is the bandwidth, counted as those of
# steps: what is read plus what is written. A processor that reads what a copy will overwrite moves
# more; steps and the other streams write only what they have read.
STREAMS = {"sum(a)": 4, "b = a": 8, "a = a*s": 8, "a = a*s + b": 12}
PROBE = f"the fastest of {', '.join(STREAMS)} and steps beyond the caches, bytes read + written"
# Steps move memory with more streams at once, which some processors serve faster. They count where
# they move so many times what the caches hold, of which hardly anything is still there.
BEYOND_CACHES = 16


def step_bytes(
    parameters: int, gradients: int, states: int, passes: int, *, of_gradients: bool = False
) -> int:
    """Bytes that a step must move: `passes` (p + g + s) + (p + s).

    Args:
        of_gradients: only the last pass reads states.
    """
    spared = (passes - 1) * states if of_gradients else 0
    return passes * (parameters + gradients + states) - spared + parameters + states


def seconds_at(bandwidth: float, size: float) -> float:
    """The least time for moving `size` bytes at `bandwidth` bytes a second."""
    return size / bandwidth
