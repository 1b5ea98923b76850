"""Float64 references of the optimizers, written from the papers; they never import optfactory.

`REFERENCES` maps a family to its reference. Tests walk the optimizers that the package
lists and fail for a family that has no entry here.
"""

from __future__ import annotations

from dataclasses import dataclass

from tests.reference import adam, adamw, lamb
from tests.reference.base import Options, Step


@dataclass(frozen=True)
class Reference:
    """One family: its step and the defaults that its papers or its users' habits give it."""

    step: Step
    defaults: Options


REFERENCES: dict[str, Reference] = {
    "adam": Reference(adam.step, adam.DEFAULTS),
    "adamw": Reference(adamw.step, adamw.DEFAULTS),
    "lamb": Reference(lamb.step, lamb.DEFAULTS),
}


def reference_of(family: str) -> Reference:
    """The reference of a family; a family without one is an error that says what to write."""
    try:
        return REFERENCES[family]
    except KeyError:
        raise AssertionError(
            f"family {family!r} has no float64 reference: write tests/reference/{family}.py "
            "from its paper and enter it in tests/reference/__init__.py"
        ) from None
