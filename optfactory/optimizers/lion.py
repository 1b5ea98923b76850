"""Lion (Chen et al. 2023, arXiv:2302.06675): steps by the sign of an interpolated momentum."""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from optfactory.config.fields import Betas, Number
from optfactory.config.peers import BitsandbytesPeer
from optfactory.config.schema import STOCHASTIC_STATE, OptimizerConfig, StateRounding
from optfactory.rules.language import StateSpec, UpdateRule

LION = UpdateRule(
    "lion",
    states=(StateSpec("exp_avg", signed=True),),
    scalars=("beta1", "one_minus_beta1", "beta2", "one_minus_beta2"),
)


class LionConfig(OptimizerConfig):
    """Lion; decoupled weight decay, steps of one size for every element."""

    family: ClassVar[str] = "lion"
    too_coarse: ClassVar[Mapping[str, float]] = {"4bit": 1.8}
    bitsandbytes_peer: ClassVar[BitsandbytesPeer] = BitsandbytesPeer(
        1, lambda betas, eps: eps == 0 and betas[0] > 0 and betas[1] > 0
    )

    state_rounding: StateRounding = STOCHASTIC_STATE

    lr: Number = Field(default=1e-4, description="learning rate")
    betas: Betas = Field(default=(0.9, 0.99), description="of the step, and of the momentum")

    @classmethod
    def rule(cls, group: Mapping[str, Any]) -> UpdateRule:
        return LION

    @classmethod
    def scalars(cls, group: Mapping[str, Any], step: Any) -> dict[str, Any]:
        lr, (beta1, beta2) = group["lr"], group["betas"]
        return {
            "decay": 1.0 - lr * group["weight_decay"],
            "step_size": lr,
            "beta1": beta1,
            "one_minus_beta1": 1.0 - beta1,
            "beta2": beta2,
            "one_minus_beta2": 1.0 - beta2,
        }
