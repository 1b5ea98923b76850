"""How commands print."""

from __future__ import annotations

import json


def print_json(value: object) -> None:
    """Print a value as JSON."""
    print(json.dumps(value, indent=2))
