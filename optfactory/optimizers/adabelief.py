"""AdaBelief (Zhuang et al. 2020, arXiv:2010.07468): Adam divided by the surprise of a gradient.

The authors' package rectifies steps in addition, as RAdam; the paper's Alg. 2 does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from optfactory.config.fields import Betas, Number
from optfactory.config.schema import STOCHASTIC_STATE, OptimizerConfig, StateRounding
from optfactory.rules.language import StateSpec, UpdateRule

ADABELIEF = UpdateRule(
    "adabelief",
    (StateSpec("exp_avg", signed=True), StateSpec("exp_avg_var", signed=False)),
    ("beta1", "one_minus_beta1", "beta2", "one_minus_beta2", "eps", "eps_hat"),
)


class AdaBeliefConfig(OptimizerConfig):
    """AdaBelief; weight decay multiplies the parameter by 1 - lr * weight_decay before the step."""

    family: ClassVar[str] = "adabelief"

    state_rounding: StateRounding = STOCHASTIC_STATE

    betas: Betas = Field(
        default=(0.9, 0.999), description="decay rates of the momentum and of the variance"
    )
    eps: Number = Field(default=1e-16, description="added to the variance, and to its root")

    @classmethod
    def rule(cls, group: Mapping[str, Any]) -> UpdateRule:
        return ADABELIEF

    @classmethod
    def scalars(cls, group: Mapping[str, Any], step: Any) -> dict[str, Any]:
        lr, (beta1, beta2) = group["lr"], group["betas"]
        c1, c2 = 1.0 - beta1**step, (1.0 - beta2**step) ** 0.5
        return {
            "decay": 1.0 - lr * group["weight_decay"],
            "step_size": lr * c2 / c1,
            "beta1": beta1,
            "one_minus_beta1": 1.0 - beta1,
            "beta2": beta2,
            "one_minus_beta2": 1.0 - beta2,
            "eps": group["eps"],
            "eps_hat": group["eps"] * c2,
        }
