"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/), as torch.optim.Muon."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from optfactory.config.fields import Beta, Number
from optfactory.config.peers import Argument, TorchPeer
from optfactory.config.schema import STOCHASTIC_STATE, StateRounding
from optfactory.matrix.coefficients import steps_of
from optfactory.optimizers.matrices import MatrixConfig
from optfactory.rules.language import StateSpec, UpdateRule

_STATES = (StateSpec("momentum_buffer", signed=True),)
_SCALARS = ("momentum", "one_minus_momentum")

MUON = UpdateRule("muon", _STATES, _SCALARS, transform="orthogonalize")
MUON_NESTEROV = UpdateRule("muon_nesterov", _STATES, _SCALARS, transform="orthogonalize")


def _one_triple(group: Mapping[str, Any]) -> tuple[float, float, float]:
    """The polynomial of all steps, as torch has it."""
    first, *others = set(steps_of(group["ns_coefficients"], group["ns_steps"]))
    if others:
        raise ValueError(
            f"{group['ns_coefficients']!r} has a polynomial for each step, torch one for all"
        )
    return first


def _torchs_adjustment(group: Mapping[str, Any]) -> str | None:
    return None if group["adjust_lr"] == "original" else str(group["adjust_lr"])


class MuonConfig(MatrixConfig):
    """Muon; matrices step by their orthogonalized momentum, other parameters by `others`."""

    family: ClassVar[str] = "muon"
    too_coarse: ClassVar[Mapping[str, float]] = {"4bit": 1.0}
    torch_peer: ClassVar[TorchPeer] = TorchPeer(
        "Muon",
        ("ns_steps", "ns_coefficients"),
        arguments={
            "ns_coefficients": Argument("ns_coefficients", lambda triple: triple, _one_triple),
            "adjust_lr_fn": Argument(
                "adjust_lr", lambda name: "original" if name is None else name, _torchs_adjustment
            ),
        },
        ndim=2,
        counts=False,
        takes_none=False,
    )

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
