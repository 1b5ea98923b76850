"""AdEMAMix (Pagliardini et al. 2024, arXiv:2409.03137): Adam with a second, slow momentum.

The default of alpha is that of bitsandbytes; the schedules follow from the step's number alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field, ValidationInfo, field_validator

from optfactory.config.fields import Count, Number, ThreeBetas
from optfactory.config.peers import BitsandbytesPeer
from optfactory.config.schema import STOCHASTIC_STATE, OptimizerConfig, StateRounding
from optfactory.rules.language import StateSpec, UpdateRule

ADEMAMIX = UpdateRule(
    "ademamix",
    (
        StateSpec("exp_avg", signed=True),
        StateSpec("exp_avg_slow", signed=True),
        StateSpec("exp_avg_sq", signed=False),
    ),
    (
        *("beta1", "one_minus_beta1", "beta2", "one_minus_beta2", "beta3", "one_minus_beta3"),
        *("slow", "eps_hat"),
    ),
)

_Steps = Annotated[Count, Field(ge=1)]


class AdEMAMixConfig(OptimizerConfig):
    """AdEMAMix; weight decay multiplies the parameter by 1 - lr * weight_decay before the step."""

    family: ClassVar[str] = "ademamix"
    bitsandbytes_peer: ClassVar[BitsandbytesPeer] = BitsandbytesPeer(
        2,
        lambda betas, eps: len(betas) == 3,
        stacked=True,
        scheduled=("alpha", "t_alpha", "t_beta3"),
    )

    state_rounding: StateRounding = STOCHASTIC_STATE

    betas: ThreeBetas = Field(
        default=(0.9, 0.999, 0.9999),
        description="decay rates of the fast average, the second moment and the slow average",
    )
    eps: Number = Field(default=1e-8, description="added to the root of the second moment")
    alpha: Number = Field(default=5.0, description="weight of the slow average")
    t_alpha: _Steps | None = Field(
        default=None, description="steps in which alpha grows from 0, evenly; null: none"
    )
    t_beta3: _Steps | None = Field(
        default=None,
        description="steps in which the slow average's half-life grows from the fast one's",
    )

    @field_validator("t_alpha", "t_beta3")
    @classmethod
    def _of_a_slow_average(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("alpha") == 0:
            raise ValueError(f"{info.field_name} is of the slow average, whose alpha is 0; drop it")
        return value

    @field_validator("t_beta3")
    @classmethod
    def _half_lives_are_positive(cls, value: int | None, info: ValidationInfo) -> int | None:
        beta1, _, beta3 = info.data.get("betas", (0.5, 0.5, 0.5))
        if value is not None and not 0 < beta1 <= beta3:
            raise ValueError(
                f"the slow average would begin with betas[0] = {beta1} and end with betas[2] = "
                f"{beta3}; t_beta3 needs 0 < betas[0] <= betas[2]"
            )
        return value

    @classmethod
    def rule(cls, group: Mapping[str, Any]) -> UpdateRule:
        return ADEMAMIX

    @classmethod
    def scalars(cls, group: Mapping[str, Any], step: Any) -> dict[str, Any]:
        lr, (beta1, beta2, _) = group["lr"], group["betas"]
        c1, c2 = 1.0 - beta1**step, (1.0 - beta2**step) ** 0.5
        beta3 = slow_beta(group, step)
        return {
            "decay": 1.0 - lr * group["weight_decay"],
            "step_size": lr * c2 / c1,
            "beta1": beta1,
            "one_minus_beta1": 1.0 - beta1,
            "beta2": beta2,
            "one_minus_beta2": 1.0 - beta2,
            "beta3": beta3,
            "one_minus_beta3": 1.0 - beta3,
            "slow": group["alpha"] * _share(step, group["t_alpha"]) * c1,
            "eps_hat": group["eps"] * c2,
        }


def slow_beta(group: Mapping[str, Any], step: Any) -> Any:
    """beta3 of a step: 1 / ln(beta3), the negative half-life, goes from that of beta1 to its own.

    >>> slow_beta({"betas": (0.5, 0.9, 0.75), "t_beta3": None}, 1.0)
    0.75
    """
    beta1, _, beta3 = group["betas"]
    if group["t_beta3"] is None:
        return beta3
    share, fast, slow = _share(step, group["t_beta3"]), math.log(beta1), math.log(beta3)
    return math.e ** (fast * slow / ((1.0 - share) * slow + share * fast))


def _share(step: Any, steps: int | None) -> Any:
    """How much of a schedule is done, at most 1; numbers and tensors alike."""
    if steps is None:
        return 1.0
    done = (step >= steps) * 1.0
    return done + (1.0 - done) * step / steps
