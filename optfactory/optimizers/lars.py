"""LARS (You, Gitman & Ginsburg 2017, arXiv:1708.03888): SGD with a rate of its own per tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from optfactory.config.fields import Number
from optfactory.config.peers import BitsandbytesPeer
from optfactory.config.schema import STOCHASTIC_STATE, StateRounding
from optfactory.optimizers.ratios import (
    BOUND_SCALARS,
    CLIP_SCALARS,
    RatioConfig,
    bound_scalars,
    clip_scalars,
    ratio_text,
)
from optfactory.optimizers.sgd import MomentumConfig, SGDConfig
from optfactory.rules.language import UpdateRule

_RATE_SCALARS = ("trust_coefficient", "eps", *BOUND_SCALARS)


class LarsConfig(RatioConfig, MomentumConfig):
    """LARS; each tensor's gradient is scaled by a ratio of norms before the momentum takes it.

    The learning rate stays outside of the momentum, as in torch, timm and bitsandbytes; in the
    paper's Algorithm 1 it is inside, where a schedule reaches past gradients only later.
    """

    family: ClassVar[str] = "lars"
    bitsandbytes_peer: ClassVar[BitsandbytesPeer] = BitsandbytesPeer(
        1,  # the second beta is the dampening, which it ignores
        lambda betas, eps: eps == 0 and betas[0] > 0,
        betas=("momentum", ""),
        fixed={"dampening": 0.0, "nesterov": False, "trust_ratio": "clip"},
        norm=True,
    )

    state_rounding: StateRounding = STOCHASTIC_STATE

    lr: Number = Field(default=1.0, description="learning rate, of which tensors take a share")
    trust_ratio: Literal["lars", "clip"] = Field(
        default="lars",
        description="lars: trust_coefficient * |p| / (|g| + weight_decay * |p| + eps) times the "
        "gradient, the paper's; clip: an update of at most max_unorm * |p| (bitsandbytes)",
    )
    max_unorm: Number | None = Field(
        default=None,
        description="limit of |update| / |p| under trust_ratio clip; null: 0.02; 0: no limit",
    )
    trust_coefficient: Number = Field(
        default=0.001, description="share of |p| that a step of lr 1 may have (the paper's eta)"
    )
    eps: Number = Field(
        default=0.0, description="added to the ratio's denominator; none in the paper"
    )

    @field_validator("momentum", "dampening", "nesterov")
    @classmethod
    def _compat_has_momentum_alone(cls, value: float, info: ValidationInfo) -> float:
        other = not value if info.field_name == "momentum" else value
        if other and info.data.get("compat") == "bitsandbytes":
            raise ValueError(
                "compat: bitsandbytes has a momentum, and neither dampening nor nesterov; drop one "
                "of the two"
            )
        return value

    @field_validator("trust_coefficient", "eps")
    @classmethod
    def _of_the_papers_ratio(cls, value: float, info: ValidationInfo) -> float:
        field = info.field_name or ""
        if value != cls.model_fields[field].default and info.data.get("trust_ratio") == "clip":
            raise ValueError(f"{field} belongs to trust_ratio: lars; set that, or drop {field}")
        return value

    @classmethod
    def rule(cls, group: Mapping[str, Any]) -> UpdateRule:
        rule = SGDConfig.rule(group)
        if group["trust_ratio"] == "lars":
            scalars, name = (*rule.scalars, *_RATE_SCALARS), rule.name.replace("sgd", "lars")
            return replace(rule, name=name, scalars=scalars, trust_ratio="lars", ratio_of="g")
        ratio = ratio_text(group)
        if ratio is None:
            return rule
        clipped = replace(rule, scalars=(*rule.scalars, *CLIP_SCALARS), trust_ratio=ratio)
        if group["compat"] == "none":
            return clipped
        return replace(clipped, name="lars_bitsandbytes", ratio_of="undecayed")

    @classmethod
    def scalars(cls, group: Mapping[str, Any], step: Any) -> dict[str, Any]:
        scalars = SGDConfig.scalars(group, step)
        if group["trust_ratio"] == "clip":
            return scalars | clip_scalars(group, 0.02)
        rate = {key: group[key] for key in ("trust_coefficient", "eps")}
        return scalars | rate | bound_scalars(group)
