"""How commands print."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping


def print_json(value: object) -> None:
    """Print a value as JSON; it has no infinite numbers, and configs are read from text too."""
    print(json.dumps(_without_infinities(value), indent=2, allow_nan=False))


def _without_infinities(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _without_infinities(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_infinities(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
