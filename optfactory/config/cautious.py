"""Fields that leave out a part of a step by its signs, and where they could leave out nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from optfactory.rules.language import UpdateRule

# Liang et al. 2024 (arXiv:2411.16085): the mask is u * g > 0, as in its Algorithm 1 and its code;
# the listing of C-AdamW has >=, which would count elements that do not move.
CAUTIOUS: Any = Field(
    default=False,
    description="step only where direction and gradient have one sign, longer by d / (n + 1) for n "
    "such elements of a tensor's d (C-Optim's paper; its code: d / n, at most 1000)",
)
# Chen et al. 2025 (arXiv:2510.12402, Alg. 1): the mask is u * p >= 0.
CAUTIOUS_WEIGHT_DECAY: Any = Field(
    default=False,
    description="decoupled decay only where the step's sign is the parameter's, or it is 0 (CWD)",
)


def refuse_idle(family: str, group: Mapping[str, Any], rule: UpdateRule, decay: float) -> None:
    """Refuse the fields where they could do nothing, or have nothing to compare.

    Args:
        group: all hyperparameters.
        rule: what they select.
        decay: what they leave of a parameter in a step with weight decay.

    Raises:
        ValidationError: names the fields.
    """
    problems = {
        "cautious": _mask_problem(family, group, rule) if group["cautious"] else "",
        "cautious_weight_decay": (
            f"weight decay of {family} is part of the gradient or of the direction here, and only "
            "decay beside the step can be left out; drop it"
            if group["cautious_weight_decay"] and decay == 1.0
            else ""
        ),
    }
    details = [
        InitErrorDetails(
            type=PydanticCustomError("value_error", "{text}", {"text": text}),
            loc=(key,),
            input=True,
        )
        for key, text in problems.items()
        if text
    ]
    if details:
        raise ValidationError.from_exception_data(family, details)


def _mask_problem(family: str, group: Mapping[str, Any], rule: UpdateRule) -> str:
    if not any(state.signed for state in rule.states):
        return (
            f"{family} keeps no momentum here, so that every step has the sign of its gradient "
            "already; drop it"
        )
    if rule.ratio_of == "g":
        return (
            f"trust_ratio: {group['trust_ratio']} is known before there is a direction to compare "
            "with the gradient; drop one of the two, or set trust_ratio: clip"
        )
    return ""
