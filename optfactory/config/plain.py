"""Values as plain Python, so that a checkpoint of them is read without running foreign code.

NumPy scalars behave as numbers and as text, and np.float64 even is a float; pickled they are calls
of NumPy, which torch.load(weights_only=True) refuses.
"""

from __future__ import annotations

import enum
import numbers
from typing import Any

_EXACT = (type(None), bool, int, float, complex, str, bytes)


def plain(value: Any) -> Any:
    """Numbers, texts, choices and arrays as Python's own types, also in lists, tuples and dicts.

    Lists, tuples and dicts are made anew; what is none of these, such as a tensor, stays as it is.

    >>> from enum import Enum
    >>> plain([Enum("Schedule", {"COSINE": "cosine"}).COSINE, (1, 2.0)])
    ['cosine', (1, 2.0)]
    """
    if isinstance(value, (list, tuple)):
        return (list if isinstance(value, list) else tuple)(map(plain, value))
    if type(value) is dict:
        return {plain(key): plain(item) for key, item in value.items()}
    scalar = plain_scalar(value)
    if scalar is value and _is_numpys(value) and hasattr(value, "tolist"):
        found = value.tolist()
        return value if _is_numpys(found) else plain(found)
    if scalar is value and isinstance(value, enum.Enum):
        return plain(value.value)
    return scalar


def plain_scalar(value: Any) -> Any:
    """A number or a text as Python's own type; anything else as it is."""
    if type(value) in _EXACT:
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, numbers.Integral):
        return int.__int__(value) if isinstance(value, int) else int(value)
    if isinstance(value, numbers.Real):
        return float.__float__(value) if isinstance(value, float) else float(value)
    if _is_numpys(value) and type(value).__name__ in ("bool", "bool_"):
        return bool(value)
    return value


def _is_numpys(value: object) -> bool:
    return type(value).__module__ == "numpy"
