"""RMSprop (Tieleman & Hinton 2012, lecture 6.5): as torch.optim.RMSprop, decay is L2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field, ValidationInfo, field_validator

from optfactory.config.fields import Beta, Number
from optfactory.config.peers import BitsandbytesPeer, TorchPeer
from optfactory.config.schema import STOCHASTIC_STATE, OptimizerConfig, StateRounding, narrowest
from optfactory.rules.language import StateSpec, UpdateRule

_SQUARES = StateSpec("square_avg", signed=False)
_MEAN = StateSpec("grad_avg", signed=True)
_MOMENTUM = StateSpec("momentum_buffer", signed=True)
_SCALARS = ("alpha", "one_minus_alpha", "eps", "coupled_decay")


class RMSpropConfig(OptimizerConfig):
    """RMSprop; weight decay is added to the gradient (L2)."""

    family: ClassVar[str] = "rmsprop"
    torch_peer: ClassVar[TorchPeer] = TorchPeer("RMSprop", ("alpha", "centered"))
    bitsandbytes_peer: ClassVar[BitsandbytesPeer] = BitsandbytesPeer(
        1,
        lambda betas, eps: eps > 0 and betas[0] > 0,
        betas=("alpha", ""),
        fixed={"momentum": 0.0, "centered": False},
    )

    state_rounding: StateRounding = STOCHASTIC_STATE

    lr: Number = Field(default=1e-2, description="learning rate")
    alpha: Beta = Field(default=0.99, description="decay rate of the second moment, in [0, 1)")
    eps: Number = Field(default=1e-8, description="added to the root of the second moment")
    momentum: Beta = Field(default=0.0, description="decay rate of the momentum of steps; 0: none")
    centered: bool = Field(
        default=False, description="divide by the standard deviation; 32-bit state only"
    )

    @field_validator("centered")
    @classmethod
    def _centered_needs_32_bits(cls, value: bool, info: ValidationInfo) -> bool:
        bits = narrowest(cls, info)
        if value and bits < 32:
            raise ValueError(
                f"centered needs 32-bit state, as a variance is less than {bits}-bit moments are "
                "exact to; set optim_bits: 32 (or a 32-bit name), or centered: false"
            )
        return value

    @classmethod
    def rule(cls, group: Mapping[str, Any]) -> UpdateRule:
        name, states, scalars = "rmsprop", [_SQUARES], [*_SCALARS]
        if group["centered"]:
            name, states = f"{name}_centered", [*states, _MEAN]
        if group["momentum"] > 0:
            name, states = f"{name}_momentum", [*states, _MOMENTUM]
            scalars.append("momentum")
        return UpdateRule(name, tuple(states), tuple(scalars))

    @classmethod
    def scalars(cls, group: Mapping[str, Any], step: Any) -> dict[str, Any]:
        momentum = {"momentum": group["momentum"]} if group["momentum"] > 0 else {}
        return {
            "decay": 1.0,
            "step_size": group["lr"],
            "alpha": group["alpha"],
            "one_minus_alpha": 1.0 - group["alpha"],
            "eps": group["eps"],
            "coupled_decay": group["weight_decay"],
            **momentum,
        }
