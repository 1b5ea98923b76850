"""What an optimizer says once, as a warning, where training goes on without what was meant."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from optfactory.groups.watch import ModelWatch, replaced_warning
from optfactory.overlooked import overlooked
from optfactory.step.plan import StepPlan

_IDLE = (
    "no parameter of this optimizer has a gradient, so that the step changed nothing; call "
    "loss.backward() first, and build the optimizer after the model was wrapped (adapters, "
    "sharding), from the parameters that are trained. This is said once"
)
_LOSSY = (
    "bfloat16 and float16 parameters are rounded to the nearest number at each step, so that "
    "updates of less than half a unit, 0.2 to 0.4 % of a bfloat16 weight, are lost; keep them by "
    "master_weights: split (bfloat16, 2 bytes a parameter) or fp32 (4 bytes), or by "
    "param_rounding: stochastic (none, on the average) or kahan (2 bytes), or set "
    "master_weights: none if this is meant. This is said once"
)


class Reminders:
    """Says once what was overlooked: settings, lost updates, replaced parameters, idle steps.

    Args:
        groups: the param groups of the optimizer that was just built.
        models: the Modules that it was built from.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]], models: Sequence[nn.Module]) -> None:
        self._watch: ModelWatch | None = ModelWatch(models)
        self._told_idle = False
        self._told_lossy = False
        self._overlooked = ""
        self._tell_of_overlooked(groups, models, stacklevel=5)
        self.of_lost_updates(groups, stacklevel=5)

    def of_lost_updates(self, groups: Sequence[Mapping[str, Any]], stacklevel: int = 4) -> None:
        """Say that small updates are lost, unless the groups say how 16-bit parameters are kept."""
        told = "" if self._told_lossy else lost_updates(groups)
        if told:
            self._told_lossy = True
            warnings.warn(told, stacklevel=stacklevel)

    def before_first_step(self, plan: StepPlan, groups: Sequence[Mapping[str, Any]]) -> None:
        """Say which parameters were replaced, and what bitsandbytes was told meanwhile."""
        watch, self._watch = self._watch, None
        if watch is None:
            return
        self._tell_of_overlooked(groups, (), stacklevel=5)
        names = watch.replaced([(slot.name, slot.parameter) for slot in plan.slots])
        if names:
            warnings.warn(replaced_warning(names), stacklevel=4)

    def after_idle_step(self, plan: StepPlan) -> None:
        """Say that no parameter had a gradient, unless none is to be trained."""
        if self._told_idle or not any(slot.parameter.requires_grad for slot in plan.slots):
            return
        self._told_idle = True
        warnings.warn(_IDLE, stacklevel=4)

    def _tell_of_overlooked(
        self, groups: Sequence[Mapping[str, Any]], models: Sequence[nn.Module], stacklevel: int
    ) -> None:
        told, self._overlooked = self._overlooked, overlooked(groups, models)
        if self._overlooked and not told:
            warnings.warn(self._overlooked, stacklevel=stacklevel)


def lost_updates(groups: Sequence[Mapping[str, Any]]) -> str:
    """What to say of small updates that are lost; empty if none are, or groups say it is meant."""
    return _LOSSY if any(map(_loses_updates, groups)) else ""


def _loses_updates(group: Mapping[str, Any]) -> bool:
    """Whether a param group trains 16-bit parameters that are rounded to nearest for no reason."""
    if group["master_weights"] is not None or group["param_rounding"] != "nearest":
        return False
    return any(p.requires_grad and p.dtype.itemsize < 4 for p in group["params"])
