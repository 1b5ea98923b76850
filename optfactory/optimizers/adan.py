"""Adan (Xie et al. 2022, arXiv:2208.06677): Nesterov's momentum by the gradient's change.

Betas are the shares that are kept, as in the authors' package; the paper's are 1 minus these.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from optfactory.config.fields import Number, ThreeBetas
from optfactory.config.schema import STOCHASTIC_STATE, OptimizerConfig, StateRounding
from optfactory.rules.language import StateSpec, UpdateRule

ADAN = UpdateRule(
    "adan",
    (
        StateSpec("exp_avg", signed=True),
        StateSpec("exp_avg_diff", signed=True),
        StateSpec("exp_avg_sq", signed=False),
        StateSpec("previous_grad", signed=True),
    ),
    (
        *("beta1", "one_minus_beta1", "beta2", "one_minus_beta2", "beta3", "one_minus_beta3"),
        *("first", "ahead", "eps_hat"),
    ),
)


class AdanConfig(OptimizerConfig):
    """Adan; weight decay divides the parameter by 1 + lr * weight_decay after the step (Eq. 5)."""

    family: ClassVar[str] = "adan"

    state_rounding: StateRounding = STOCHASTIC_STATE

    betas: ThreeBetas = Field(
        default=(0.98, 0.92, 0.99),
        description="decay rates of the momentum, of the gradient's change and the second moment",
    )
    eps: Number = Field(default=1e-8, description="added to the root of the second moment")

    @classmethod
    def rule(cls, group: Mapping[str, Any]) -> UpdateRule:
        return ADAN

    @classmethod
    def scalars(cls, group: Mapping[str, Any], step: Any) -> dict[str, Any]:
        lr, (beta1, beta2, beta3) = group["lr"], group["betas"]
        c1, c2, c3 = 1.0 - beta1**step, 1.0 - beta2**step, (1.0 - beta3**step) ** 0.5
        decay = 1.0 / (1.0 + lr * group["weight_decay"])
        # The skeleton decays before the step, so that the step must shrink too; bitsandbytes after.
        shrink = 1.0 if group["compat"] == "bitsandbytes" else decay
        return {
            "decay": decay,
            "step_size": shrink * lr * c3 / c1,
            "beta1": beta1,
            "one_minus_beta1": 1.0 - beta1,
            "beta2": beta2,
            "one_minus_beta2": 1.0 - beta2,
            "beta3": beta3,
            "one_minus_beta3": 1.0 - beta3,
            "first": 0.0 ** (step - 1.0),
            "ahead": beta2 * c1 / c2,
            "eps_hat": group["eps"] * c3,
        }
