"""Who calls: some tools of torch need another answer than users, and do not say who they are."""

from __future__ import annotations

import sys
from types import FrameType

# Wrappers that schedulers, hooks, profilers and decorators put between a tool and its callee.
_FRAMES = 12


def caller_in(module: str) -> FrameType | None:
    """The frame of a module's function that called, directly or through wrappers; None without."""
    frame: FrameType | None = sys._getframe(1)
    for _ in range(_FRAMES):
        if frame is None or frame.f_globals.get("__name__") == module:
            return frame
        frame = frame.f_back
    return None
