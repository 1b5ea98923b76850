"""SGD with momentum (Sutskever et al. 2013): as torch.optim.SGD, decay is L2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field, ValidationInfo, field_validator

from optfactory.config.fields import Beta, Number
from optfactory.config.peers import BitsandbytesPeer, TorchPeer
from optfactory.config.schema import STOCHASTIC_STATE, OptimizerConfig, StateRounding, narrowest
from optfactory.rules.language import StateSpec, UpdateRule

MOMENTUM_STATE = StateSpec("momentum_buffer", signed=True)
_SCALARS = ("coupled_decay", "added", "kept")

SGD = UpdateRule("sgd", (MOMENTUM_STATE,), _SCALARS)
SGD_PLAIN = UpdateRule("sgd_plain", (), ("coupled_decay",))
SGD_NESTEROV = UpdateRule("sgd_nesterov", (MOMENTUM_STATE,), (*_SCALARS, "momentum"))


class MomentumConfig(OptimizerConfig):
    """Hyperparameters of the optimizers whose momentum begins with the first gradient."""

    momentum: Beta = Field(default=0.9, description="decay rate of the momentum, in [0, 1)")
    dampening: Number = Field(
        default=0.0, description="share of a gradient the momentum leaves out"
    )
    nesterov: bool = Field(default=False, description="step by Nesterov's momentum")

    @field_validator("momentum")
    @classmethod
    def _no_momentum_has_no_codes(cls, value: float, info: ValidationInfo) -> float:
        bits = narrowest(cls, info)
        if value == 0 and bits < 32:
            raise ValueError(
                f"without momentum there is no state to keep at {bits} bits; set optim_bits: 32 "
                "(or a 32-bit name), or a momentum above 0"
            )
        return value

    @field_validator("dampening", "nesterov")
    @classmethod
    def _of_a_momentum(cls, value: float | bool, info: ValidationInfo) -> float | bool:
        if value and info.data.get("momentum") == 0:
            raise ValueError(
                f"{info.field_name} is of the momentum, which is 0; drop one of the two"
            )
        return value

    @field_validator("nesterov")
    @classmethod
    def _nesterov_has_no_dampening(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("dampening", 0.0) > 0:
            raise ValueError("nesterov takes gradients whole; set dampening: 0, or nesterov: false")
        return value


def momentum_scalars(group: Mapping[str, Any], step: Any) -> dict[str, Any]:
    """What the momentum keeps of itself and adds of a gradient: the first one it takes whole.

    >>> momentum_scalars({"momentum": 0.9, "dampening": 0.5}, 1.0)
    {'added': 1.0, 'kept': 0.0}
    >>> momentum_scalars({"momentum": 0.9, "dampening": 0.5}, 2.0)
    {'added': 0.5, 'kept': 0.9}
    """
    first = 0.0 ** (step - 1.0)  # 1 at the first step, then 0
    return {
        "added": 1.0 - group["dampening"] * (1.0 - first),
        "kept": group["momentum"] * (1.0 - first),
    }


class SGDConfig(MomentumConfig):
    """SGD with momentum; weight decay is added to the gradient (L2)."""

    family: ClassVar[str] = "sgd"
    spellings: ClassVar[tuple[str, ...]] = ("momentum",)  # timm; its `sgd` is Nesterov's
    torch_peer: ClassVar[TorchPeer] = TorchPeer("SGD", ("dampening", "nesterov"), counts=False)
    bitsandbytes_peer: ClassVar[BitsandbytesPeer] = BitsandbytesPeer(
        1,  # the second beta is the dampening, which it ignores; if it is not 0, it may be Lion's
        lambda betas, eps: eps == 0 and betas[0] > 0 and betas[1:] == (0,),
        betas=("momentum", ""),
        fixed={"dampening": 0.0, "nesterov": False},
    )

    state_rounding: StateRounding = STOCHASTIC_STATE

    @classmethod
    def rule(cls, group: Mapping[str, Any]) -> UpdateRule:
        if group["momentum"] == 0:
            return SGD_PLAIN
        return SGD_NESTEROV if group["nesterov"] else SGD

    @classmethod
    def scalars(cls, group: Mapping[str, Any], step: Any) -> dict[str, Any]:
        scalars = {
            "decay": 1.0,
            "step_size": group["lr"],
            "coupled_decay": group["weight_decay"],
        }
        if group["momentum"] > 0:
            scalars |= momentum_scalars(group, step)
        if group["nesterov"]:
            scalars["momentum"] = group["momentum"]
        return scalars
