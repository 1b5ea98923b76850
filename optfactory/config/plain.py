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
    """A number, a text or a choice as Python's own type, also inside of lists, tuples and dicts.

    Lists, tuples and dicts are made anew; what is none of these, such as a tensor, stays as it is.

    >>> from enum import Enum
    >>> plain([Enum("Schedule", {"COSINE": "cosine"}).COSINE, (1, 2.0)])
    ['cosine', (1, 2.0)]
    """
    if type(value) in _EXACT:
        return value
    if isinstance(value, (list, tuple)):
        return (list if isinstance(value, list) else tuple)(map(plain, value))
    if type(value) is dict:
        return {plain(key): plain(item) for key, item in value.items()}
    return _plain_scalar(value)


def _plain_scalar(value: Any) -> Any:
    """What only looks like Python's own types; others' numbers first say what they stand for."""
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, numbers.Integral):
        return int.__int__(value) if isinstance(value, int) else int(value)
    if isinstance(value, numbers.Real):
        return float.__float__(value) if isinstance(value, float) else float(value)
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        found = value.tolist()  # arrays, np.bool_, complex numbers
        return found if type(found).__module__ == "numpy" else plain(found)
    return value
