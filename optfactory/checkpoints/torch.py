"""The layouts of torch.optim, whatever the implementation (foreach, fused, ...).

A family's `torch_peer` says which class has its mathematics. States have the same names there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from optfactory.checkpoints.convert import decode
from optfactory.checkpoints.fields import FLOATS, Fields
from optfactory.checkpoints.peers import model_of, peers_of
from optfactory.checkpoints.records import GroupRecord, Record
from optfactory.config.peers import Argument, TorchPeer
from optfactory.state.layout import StateLayout

# How torch computes a step, not what; torch takes them from the checkpoint that it loads.
_SWITCHES = ("capturable", "foreach", "fused", "differentiable")

# The numbers beside the states are float32 there, and after a load of the parameter's dtype.
_TOLERANCE = 1e-6


class TorchLayout:
    """Reads and writes state dicts of an optimizer of torch.optim.

    Args:
        families: those that have it: of Adam and AdamW it may be open which one wrote a dict.
    """

    takes_dtensors = True

    def __init__(self, families: Iterable[str]) -> None:
        known = peers_of(TorchPeer)
        self.families = tuple(family for family in families if family in known)
        self._peer = known[self.families[0]] if self.families else None
        names = [known[family].name for family in self.families]
        self.title = f"torch.optim.{' or '.join(names)}" if names else "torch.optim"

    @classmethod
    def of_settings(cls, settings: set[Any]) -> TorchLayout | None:
        """The layout of a checkpoint whose groups have these keys; None if it is another's."""
        found = [
            family
            for family, peer in peers_of(TorchPeer).items()
            if settings.issuperset(peer.marks) and settings.isdisjoint(peer.strangers)
        ]
        return cls(found) if found else None

    @property
    def expressed(self) -> tuple[str, ...]:
        return tuple(map(self._field, self._arguments))

    @property
    def _arguments(self) -> dict[str, Any]:
        return _arguments(self._peer.name) if self._peer else {}

    @property
    def _converted(self) -> Mapping[str, Argument]:
        return self._peer.arguments if self._peer else {}

    def _field(self, argument: str) -> str:
        if argument in self._converted:
            return self._converted[argument].field
        renamed = self._peer.renamed if self._peer else {}
        return renamed.get(argument, argument)

    def read_group(self, saved: Mapping[str, Any]) -> GroupRecord:
        """Torch's hyperparameters; newer releases of Adam also say how weight decay enters."""
        values = {
            self._field(key): value
            for key, value in saved.items()
            if key not in _SWITCHES and (self._field(key) == key or isinstance(value, bool))
        }
        families = self.families
        for field in {self._field(key) for key in saved} - saved.keys() & values.keys():
            families = tuple(
                family
                for family in families
                if model_of(family).model_fields[field].default == values[field]
            )
        values |= {
            argument.field: argument.read(saved[key])
            for key, argument in self._converted.items()
            if key in saved
        }
        return GroupRecord(families[0] if len(families) == 1 else "", values, [], families)

    def read_entries(
        self, fields: Fields, layout: StateLayout, saved: Mapping[str, Any]
    ) -> Record | None:
        """Torch keeps states in the parameter's dtype."""
        names = [state.name for state in layout.rule.states]
        if self._peer and not self._peer.counts:
            if all(fields.peek(name) is None for name in names):  # before the first step
                fields.ignore("momentum_buffer", *names)
                return None
            step: Tensor | None = torch.ones((), dtype=torch.float64, device="cpu")  # or more
        else:
            step = fields.step()
        states = {
            state.name: fields.state(state.name, state, layout.shape, FLOATS)
            for state in layout.rule.states
        }
        self._check_numbers(fields, step, saved)
        return Record.of(step, states)

    def _check_numbers(self, fields: Fields, step: Tensor | None, saved: Mapping[str, Any]) -> None:
        """See that what torch keeps beside the states is what the number of steps says."""
        if self._peer is None or step is None:
            return
        model = model_of(self.families[0])
        given = {key: saved[key] for key in self.expressed if key in saved and key not in _SWITCHES}
        group = model(**{**given, "name": self.families[0]}).model_dump()
        for key, expected in self._peer.numbers(group, float(step)).items():
            number, precision = fields.number(key)
            if number is None:
                continue
            if not abs(number - expected) <= _TOLERANCE + precision * float(step) * expected:
                fields.note(
                    key,
                    f"is {number:.6g} after {float(step):.0f} steps, and {expected:.6g} follows "
                    "from the checkpoint's hyperparameters, which must have been changed during "
                    "the run; it cannot be gone on with",
                )

    def write_problems(self, group: Mapping[str, Any]) -> list[str]:
        """Values that torch does not have, and parameters that it does not take."""
        if not self._arguments:
            return [f"optimizer: torch {torch.__version__} has no {self.title}"]
        problems = []
        for argument in self._converted.values():
            try:
                argument.write(group)
            except ValueError as error:
                problems.append(f"{argument.field}: {error}")
        ndim = self._peer.ndim if self._peer else None
        other = sorted({p.ndim for p in group["params"]} - {ndim}) if ndim else []
        if other:
            problems.append(
                f"params: {self.title} takes parameters of {ndim} dimensions, and some here have "
                f"{', '.join(map(str, other))}"
            )
        return problems

    def write_group(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """Torch's hyperparameters, with the implementation left to torch."""
        written = {
            key: group.get(self._field(key), default) for key, default in self._arguments.items()
        }
        return written | {key: item.write(group) for key, item in self._converted.items()}

    def write_entries(
        self, layout: StateLayout, record: Record, group: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Float32 values, the step too; torch casts them to the parameter's dtype."""
        states: dict[str, Any] = {
            name: decode(stored).clone() for name, stored in record.states.items()
        }
        if self._peer is None or not self._peer.counts:
            has_begun = record.step > 0 or (self._peer is not None and not self._peer.takes_none)
            return states if has_begun else dict.fromkeys(states)
        numbers = {
            key: torch.tensor(float(value), dtype=torch.float32, device="cpu")
            for key, value in self._peer.numbers(group, float(record.step)).items()
        }
        return {"step": record.step.float(), **numbers, **states}


@cache
def _arguments(name: str) -> dict[str, Any]:
    """The hyperparameters of an optimizer of torch, with their defaults; none in an older torch."""
    one = torch.zeros((1, 1), dtype=torch.float32, device="cpu")
    kind = getattr(torch.optim, name, None)
    return dict(kind([one], lr=1e-3).defaults) if kind else {}
