"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/), as torch.optim.Muon."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from optfactory.config.fields import Beta, Number
from optfactory.config.schema import STOCHASTIC_STATE, StateRounding
from optfactory.optimizers.matrices import MatrixConfig
from optfactory.rules.language import StateSpec, UpdateRule

_STATES = (StateSpec("momentum_buffer", signed=True),)
_SCALARS = ("momentum", "one_minus_momentum")

MUON = UpdateRule("muon", _STATES, _SCALARS, transform="orthogonalize")
MUON_NESTEROV = UpdateRule("muon_nesterov", _STATES, _SCALARS, transform="orthogonalize")


class MuonConfig(MatrixConfig):
    """Muon; matrices step by their orthogonalized momentum, other parameters by `others`."""

    family: ClassVar[str] = "muon"

    weight_decay: Number = Field(default=0.1, description="weight decay coefficient")
    momentum: Beta = Field(default=0.95, description="decay rate of the momentum, in [0, 1)")
    nesterov: bool = Field(default=True, description="direction by Nesterov's momentum")
    state_rounding: StateRounding = STOCHASTIC_STATE

    @classmethod
    def rule(cls, group: Mapping[str, Any]) -> UpdateRule:
        return MUON_NESTEROV if group["nesterov"] else MUON

    @classmethod
    def scalars(cls, group: Mapping[str, Any], step: Any) -> dict[str, Any]:
        return {
            "decay": 1.0 - group["lr"] * group["weight_decay"],
            "step_size": group["lr"],
            "momentum": group["momentum"],
            "one_minus_momentum": 1.0 - group["momentum"],
        }
