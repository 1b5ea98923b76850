"""Adagrad (Duchi, Hazan & Singer 2011): as torch.optim.Adagrad, decay is L2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from pydantic import Field, ValidationInfo, field_validator

from optfactory.config.fields import Number
from optfactory.config.peers import BitsandbytesPeer, TorchPeer
from optfactory.config.schema import STOCHASTIC_STATE, OptimizerConfig, StateRounding
from optfactory.rules.language import StateSpec, UpdateRule

SUM = StateSpec("sum", signed=False)


class AdagradConfig(OptimizerConfig):
    """Adagrad; weight decay is added to the gradient (L2)."""

    family: ClassVar[str] = "adagrad"
    torch_peer: ClassVar[TorchPeer] = TorchPeer(
        "Adagrad", ("lr_decay", "initial_accumulator_value")
    )
    bitsandbytes_peer: ClassVar[BitsandbytesPeer] = BitsandbytesPeer(
        1,
        lambda betas, eps: betas[:1] == (0,),
        betas=("", ""),
        fixed={"lr_decay": 0.0, "initial_accumulator_value": 0.0},
    )

    state_rounding: StateRounding = STOCHASTIC_STATE

    lr: Number = Field(default=1e-2, description="learning rate")
    lr_decay: Number = Field(default=0.0, description="learning rate / (1 + (step - 1) * lr_decay)")
    eps: Number = Field(default=1e-10, description="added to the root of the sum")
    initial_accumulator_value: Number = Field(default=0.0, description="what sums begin with")

    @field_validator("lr_decay", "initial_accumulator_value")
    @classmethod
    def _compat_has_neither(cls, value: float, info: ValidationInfo) -> float:
        if value and info.data.get("compat") == "bitsandbytes":
            raise ValueError(f"compat: bitsandbytes has no {info.field_name}; drop one of the two")
        return value

    @classmethod
    def rule(cls, group: Mapping[str, Any]) -> UpdateRule:
        begins = replace(SUM, fill=group["initial_accumulator_value"])
        return UpdateRule("adagrad", (begins,), ("coupled_decay", "eps"))

    @classmethod
    def scalars(cls, group: Mapping[str, Any], step: Any) -> dict[str, Any]:
        return {
            "decay": 1.0,
            "step_size": group["lr"] / (1.0 + (step - 1.0) * group["lr_decay"]),
            "coupled_decay": group["weight_decay"],
            "eps": group["eps"],
        }
