"""What the optimizers with Adam's two moments share: fields, states and scalars."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, ValidationInfo, field_validator

from optfactory.config.fields import Betas, Number
from optfactory.config.peers import BitsandbytesPeer, TorchPeer
from optfactory.config.schema import OptimizerConfig, narrowest
from optfactory.rules.language import StateSpec

MOMENTS = (StateSpec("exp_avg", signed=True), StateSpec("exp_avg_sq", signed=False))
MAX_MOMENT = StateSpec("max_exp_avg_sq", signed=False)
ADAM_OF_TORCH = TorchPeer("Adam", ("amsgrad",), renamed={"decoupled_weight_decay": "adam_w_mode"})
# Decay is decoupled in all of it, also in its Adam.
ADAM_OF_BITSANDBYTES = BitsandbytesPeer(
    2, lambda betas, eps: len(betas) == 2, fixed={"amsgrad": False, "adam_w_mode": True}
)
MOMENT_SCALARS = (
    "beta1",
    "one_minus_beta1",
    "beta2",
    "one_minus_beta2",
    "eps_hat",
    "coupled_decay",
)


class MomentsConfig(OptimizerConfig):
    """Hyperparameters of the optimizers with Adam's two moments.

    >>> from optfactory.registry import get_optimizer_info
    >>> issubclass(get_optimizer_info("adam8bit").config_class, MomentsConfig)
    True
    """

    betas: Betas = Field(
        default=(0.9, 0.999), description="decay rates of the first and second moment, in [0, 1)"
    )
    eps: Number = Field(default=1e-8, description="added to the root of the second moment")
    bias_correction: bool = Field(
        default=True, description="correct the moments' bias towards zero in early steps"
    )
    adam_w_mode: bool = Field(
        default=True, description="true: decoupled decay (AdamW); false: L2, added to the gradient"
    )
    amsgrad: bool = Field(
        default=False, description="use the maximum of past second moments; 32-bit state only"
    )

    @field_validator("bias_correction")
    @classmethod
    def _compat_corrects(cls, value: bool, info: ValidationInfo) -> bool:
        if not value and info.data.get("compat") == "bitsandbytes":
            raise ValueError("compat: bitsandbytes always corrects the bias; drop one of the two")
        return value

    @field_validator("adam_w_mode")
    @classmethod
    def _compat_decays_apart(cls, value: bool, info: ValidationInfo) -> bool:
        decays = info.data.get("weight_decay", 0.0) > 0
        if not value and decays and info.data.get("compat") == "bitsandbytes":
            raise ValueError(
                "compat: bitsandbytes has decoupled decay only; set adam_w_mode: true, or take the "
                "adamw family"
            )
        return value

    @field_validator("amsgrad")
    @classmethod
    def _amsgrad_needs_32_bits(cls, value: bool, info: ValidationInfo) -> bool:
        bits = narrowest(cls, info)
        if value and bits < 32:
            raise ValueError(
                f"amsgrad needs 32-bit state, and optim_bits is {bits} here; "
                "set optim_bits: 32 (or a 32-bit name), or amsgrad: false"
            )
        return value


def bias_corrections(group: Mapping[str, Any], step: Any) -> tuple[Any, Any]:
    """c1 = 1 - beta1^step and c2 = sqrt(1 - beta2^step); both 1 without bias correction.

    >>> bias_corrections({"bias_correction": True, "betas": (0.5, 0.75)}, 1)
    (0.5, 0.5)
    """
    if not group["bias_correction"]:
        return 1.0, 1.0
    beta1, beta2 = group["betas"]
    return 1.0 - float(beta1) ** step, (1.0 - float(beta2) ** step) ** 0.5


def moment_scalars(group: Mapping[str, Any], c2: Any) -> dict[str, Any]:
    """The scalars every rule with Adam's two moments shares; 1 - beta is formed in float64.

    Args:
        group: hyperparameters by field name.
        c2: the second moment's bias correction at this step, as `bias_corrections` gives it.
    """
    beta1, beta2 = (float(beta) for beta in group["betas"])
    return {
        "beta1": beta1,
        "one_minus_beta1": 1.0 - beta1,
        "beta2": beta2,
        "one_minus_beta2": 1.0 - beta2,
        "eps_hat": group["eps"] * c2,
        "coupled_decay": 0.0 if group["adam_w_mode"] else group["weight_decay"],
    }
