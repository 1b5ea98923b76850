"""Float64 references of the optimizers, written from the papers; they never import optfactory.

A family's reference is the module of its name: `step`, the `DEFAULTS` that its papers or its users'
habits give it, the `STATES` it keeps, and the `FACTS` that are true of it alone. Tests walk the
optimizers that the package lists and fail for a family that has no module here.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass

from tests.reference.base import Options, Signs, Step
from tests.reference.facts import Facts


@dataclass(frozen=True)
class Reference:
    """One family: its step, defaults, states and whether they can be negative, and facts."""

    step: Step
    defaults: Options
    states: Signs
    facts: Facts


def _found() -> dict[str, Reference]:
    modules = {
        info.name: importlib.import_module(f"{__name__}.{info.name}")
        for info in pkgutil.iter_modules(__path__)
    }
    return {
        family: Reference(
            module.step, module.DEFAULTS, module.STATES, getattr(module, "FACTS", Facts())
        )
        for family, module in modules.items()
        if hasattr(module, "DEFAULTS")
    }


REFERENCES: dict[str, Reference] = _found()


def reference_of(family: str) -> Reference:
    """The reference of a family; a family without one is an error that says what to write."""
    try:
        return REFERENCES[family]
    except KeyError:
        raise AssertionError(
            f"family {family!r} has no float64 reference: write tests/reference/{family}.py "
            "from its paper, as CONTRIBUTING.md shows"
        ) from None
