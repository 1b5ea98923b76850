"""Adam (Kingma & Ba 2015, arXiv:1412.6980): as torch.optim.Adam, decay is L2 by default."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from optfactory.rules import StateSpec, UpdateRule
from optfactory.schema import OptimizerConfig, bias_corrections

MOMENTS = (StateSpec("exp_avg", signed=True), StateSpec("exp_avg_sq", signed=False))
MAX_MOMENT = StateSpec("max_exp_avg_sq", signed=False)
MOMENT_SCALARS = (
    "beta1",
    "one_minus_beta1",
    "beta2",
    "one_minus_beta2",
    "eps_hat",
    "coupled_decay",
)

ADAM = UpdateRule("adam", MOMENTS, MOMENT_SCALARS)
ADAM_AMSGRAD = UpdateRule("adam_amsgrad", (*MOMENTS, MAX_MOMENT), MOMENT_SCALARS)


def moment_scalars(group: Mapping[str, Any], step: int) -> dict[str, float]:
    """The scalars every rule with Adam's two moments shares; 1 - beta is formed in float64."""
    beta1, beta2 = (float(beta) for beta in group["betas"])
    _, c2 = bias_corrections(group, step)
    return {
        "beta1": beta1,
        "one_minus_beta1": 1.0 - beta1,
        "beta2": beta2,
        "one_minus_beta2": 1.0 - beta2,
        "eps_hat": group["eps"] * c2,
        "coupled_decay": 0.0 if group["adam_w_mode"] else group["weight_decay"],
    }


class AdamConfig(OptimizerConfig):
    """Adam; weight decay is added to the gradient (L2) unless adam_w_mode is true."""

    family: ClassVar[str] = "adam"

    adam_w_mode: bool = Field(
        default=False, description="true: decoupled decay (AdamW); false: L2, added to the gradient"
    )

    @classmethod
    def rule(cls, group: Mapping[str, Any]) -> UpdateRule:
        return ADAM_AMSGRAD if group["amsgrad"] else ADAM

    @classmethod
    def scalars(cls, group: Mapping[str, Any], step: int) -> dict[str, float]:
        c1, c2 = bias_corrections(group, step)
        lr = float(group["lr"])
        decoupled_decay = group["weight_decay"] if group["adam_w_mode"] else 0.0
        return {
            "decay": 1.0 - lr * decoupled_decay,
            "step_size": lr * c2 / c1,
            **moment_scalars(group, step),
        }
