"""The entries of one parameter in a checkpoint, handed out only as what they must be."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor

from optfactory.checkpoints.foreign import copied
from optfactory.rules.language import StateSpec
from optfactory.state.quantmap import QuantizationMap, map_for
from optfactory.state.specs import TensorSpec

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# Four units in the last place of a float32 number.
_LAST_BITS = 2.0**-21


class Fields:
    """Reads the entries of a parameter and notes every problem with its name and its field.

    A method returns None where it noted a problem.

    Attributes:
        problems: what was noted so far.
    """

    def __init__(self, name: str, entries: Mapping[Any, Any]) -> None:
        self.problems: list[str] = []
        self._name = name
        self._unread = dict(entries)

    def __contains__(self, key: str) -> bool:
        return key in self._unread

    def peek(self, key: str) -> object:
        """The value of a field as it is; None without it."""
        return self._unread.get(key)

    def merge(self, key: str) -> None:
        """Put the entries that are nested under a key beside the others."""
        nested = self._unread.pop(key, {})
        if isinstance(nested, Mapping):
            self._unread = {**nested, **self._unread}
        else:
            self.note(key, f"expected a mapping, got {type(nested).__name__}")

    def replace(self, key: str, value: Tensor) -> None:
        """Read another tensor in a field's place."""
        self._unread[key] = value

    def note(self, key: str, problem: str) -> None:
        """Note a problem of one field."""
        self.problems.append(f"{self._name}.{key}: {problem}")

    def tensor(
        self, key: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
    ) -> Tensor | None:
        """A plain dense tensor of this shape and one of these dtypes."""
        if key not in self._unread:
            self.note(key, "missing in the checkpoint")
            return None
        value = self._unread.pop(key)
        dtype = next((d for d in dtypes if d == getattr(value, "dtype", None)), dtypes[0])
        problem = TensorSpec(dtype, shape).problem(value)
        if problem:
            self.note(key, problem)
            return None
        return value.detach() if isinstance(value, Tensor) else None

    def state(
        self, key: str, state: StateSpec, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
    ) -> Tensor | None:
        """A state that was not quantized."""
        value = self.tensor(key, shape, dtypes)
        if value is not None and not state.signed and bool((value < 0).any()):
            self.note(key, "has negative elements, which this state never has")
            return None
        return value

    def scales(self, key: str, shape: tuple[int, ...], *, finite: bool = True) -> Tensor | None:
        """The scales of a quantized state; where some need not be finite, none is negative."""
        value = self.tensor(key, shape, (torch.float32,))
        if value is None:
            return None
        if finite and not bool(((value >= 0) & value.isfinite()).all()):
            self.note(key, "has scales that are NaN, infinite or negative")
            return None
        if bool((value < 0).any()):
            self.note(key, "has scales that are negative")
            return None
        return value

    def map(self, key: str, state: StateSpec, size: int = 256) -> QuantizationMap | None:
        """The quantization map that is stored beside the codes.

        Other libraries compute it, and last bits depend on the processor; codes mean the same.
        """
        value = self.tensor(key, (size,), (torch.float32,))
        if value is None:
            return None
        values = tuple(value.tolist())
        known, low = map_for(state.signed, "table"), -1.0 if state.signed else 0.0
        if not all(low <= item <= 1.0 for item in values):
            self.note(key, f"expected {size} numbers from {low:g} to 1")
            return None
        if values == known.values:
            return known
        alike = len(values) == len(known.values) and all(
            math.isclose(*pair, rel_tol=_LAST_BITS)
            for pair in zip(values, known.values, strict=True)
        )
        return QuantizationMap(known.name if alike else "stored", values)

    def step(self) -> Tensor | None:
        """The number of steps, stored as a number or a 0-d tensor; as a float64 tensor."""
        if "step" not in self._unread:
            self.note("step", "missing in the checkpoint")
            return None
        value = self._unread.pop("step")
        if isinstance(value, Tensor) and not value.is_complex():
            problem = TensorSpec(value.dtype, ()).problem(value)
            if problem:
                self.note("step", problem)
                return None
            value = value.item()
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self.note("step", f"expected a number, got {type(value).__name__}")
        elif not (0 <= value < 2**30 and float(value).is_integer()):
            self.note("step", f"expected a count below 2^30, got {value}")
        else:
            return torch.tensor(float(value), dtype=torch.float64, device="cpu")
        return None

    def number(self, key: str) -> tuple[float | None, float]:
        """A number, as such or as a 0-d tensor, and the precision of its dtype."""
        value = self._unread.get(key)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            value = torch.tensor(float(value), dtype=torch.float64, device="cpu")
            self._unread[key] = value
        read = self.tensor(key, (), FLOATS)
        return (None, 0.0) if read is None else (read.item(), torch.finfo(read.dtype).eps)

    def foreign(self, known: Container[object], device: torch.device) -> dict[Any, Any]:
        """A copy of the fields that are no known state, with their tensors on a device."""
        found = {}
        for key in [key for key in self._unread if key not in known]:
            value = self._unread.pop(key)
            try:
                found[key] = copied(value, device)
            except Exception as error:  # whatever the copy of a stranger's object raises
                self.note(str(key), f"cannot be copied to {device} ({error})")
        return found

    def ignore(self, *keys: str) -> None:
        """Leave out fields that nothing is lost without."""
        for key in keys:
            self._unread.pop(key, None)

    def expect_no_more(self) -> None:
        """Note the fields that nobody asked for."""
        if self._unread:
            extra = ", ".join(map(str, self._unread))
            self.problems.append(f"{self._name}: the checkpoint has what no state here is: {extra}")
