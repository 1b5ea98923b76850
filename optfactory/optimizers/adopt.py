"""ADOPT (Taniguchi et al. 2024, arXiv:2411.02853): an Adam that converges with any beta2.

Others clip at other powers of the step, or not at all; the paper's final version says t^(1/4).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from optfactory.config.fields import Betas, Number
from optfactory.config.schema import STOCHASTIC_STATE, OptimizerConfig, StateRounding
from optfactory.optimizers.moments import MOMENTS
from optfactory.rules.language import UpdateRule

ADOPT = UpdateRule(
    "adopt",
    MOMENTS,
    ("beta1", "one_minus_beta1", "kept", "added", "eps", "clip", "coupled_decay"),
)


class AdoptConfig(OptimizerConfig):
    """ADOPT; weight decay is added to the gradient (L2) unless it is decoupled."""

    family: ClassVar[str] = "adopt"

    state_rounding: StateRounding = STOCHASTIC_STATE

    betas: Betas = Field(
        default=(0.9, 0.9999), description="decay rates of the first and second moment, in [0, 1)"
    )
    eps: Number = Field(default=1e-6, description="least root of the second moment")
    decoupled_weight_decay: bool = Field(
        default=False, description="true: decoupled decay (AdamW); false: L2, added to the gradient"
    )

    @classmethod
    def rule(cls, group: Mapping[str, Any]) -> UpdateRule:
        return ADOPT

    @classmethod
    def scalars(cls, group: Mapping[str, Any], step: Any) -> dict[str, Any]:
        lr, (beta1, beta2) = group["lr"], group["betas"]
        decoupled = group["weight_decay"] if group["decoupled_weight_decay"] else 0.0
        later = 1.0 - 0.0 ** (step - 1.0)  # 0 at the first step, which moves nothing; then 1
        return {
            "decay": 1.0 - lr * decoupled * later,
            "step_size": lr,
            "beta1": beta1,
            "one_minus_beta1": 1.0 - beta1,
            "kept": beta2 * later,
            "added": 1.0 - beta2 * later,
            "eps": group["eps"],
            "clip": (step - 1.0) ** 0.25,
            "coupled_decay": group["weight_decay"] - decoupled,
        }
