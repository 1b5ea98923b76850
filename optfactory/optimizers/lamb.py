"""LAMB (You et al. 2020, arXiv:1904.00962): Adam whose step is scaled per tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from optfactory.config.fields import Bounds, Number
from optfactory.config.peers import BitsandbytesPeer
from optfactory.optimizers.moments import (
    ADAM_OF_BITSANDBYTES,
    MAX_MOMENT,
    MOMENT_SCALARS,
    MOMENTS,
    MomentsConfig,
    bias_corrections,
    moment_scalars,
)
from optfactory.rules.language import UpdateRule

LAMB_SCALARS = (
    *(*MOMENT_SCALARS, "bias_ratio", "direction_decay"),
    *("max_unorm", "ratio_low", "ratio_high", "adapts"),
)

LAMB = UpdateRule("lamb", MOMENTS, LAMB_SCALARS, trust_ratio="lamb")
LAMB_AMSGRAD = UpdateRule("lamb_amsgrad", (*MOMENTS, MAX_MOMENT), LAMB_SCALARS, trust_ratio="lamb")


class LambConfig(MomentsConfig):
    """LAMB; the step of each tensor is scaled by a trust ratio of norms, at 8 bits too."""

    family: ClassVar[str] = "lamb"
    bitsandbytes_peer: ClassVar[BitsandbytesPeer] = replace(ADAM_OF_BITSANDBYTES, norm=True)

    eps: Number = Field(default=1e-6, description="added to the root of the second moment")
    weight_decay: Number = Field(default=0.01, description="weight decay coefficient")
    trust_ratio: Literal["lamb", "clip"] = Field(
        default="lamb",
        description="lamb: |p| / |u|, the paper's; clip: at most max_unorm * |p| (bitsandbytes)",
    )
    max_unorm: Number | None = Field(
        default=None,
        description="limit of |update| / |p| under trust_ratio clip; null: 1.0; 0: no limit",
    )

    trust_ratio_bounds: Bounds | None = Field(
        default=None, description="least and greatest trust ratio, e.g. [0.0, 10.0]; null: none"
    )
    always_adapt: bool = Field(
        default=True, description="false: no trust ratio where weight_decay is 0 (timm, apex)"
    )

    @field_validator("trust_ratio")
    @classmethod
    def _compat_clips(cls, value: str, info: ValidationInfo) -> str:
        if value != "clip" and info.data.get("compat") == "bitsandbytes":
            raise ValueError("compat: bitsandbytes has no other ratio than trust_ratio: clip")
        return value

    @field_validator("max_unorm")
    @classmethod
    def _max_unorm_needs_clip(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and info.data.get("trust_ratio") == "lamb":
            raise ValueError("max_unorm belongs to trust_ratio: clip; set that, or drop max_unorm")
        return value

    @classmethod
    def rule(cls, group: Mapping[str, Any]) -> UpdateRule:
        rule = LAMB_AMSGRAD if group["amsgrad"] else LAMB
        return replace(rule, trust_ratio=_ratio_text(group))

    @classmethod
    def scalars(cls, group: Mapping[str, Any], step: Any) -> dict[str, Any]:
        c1, c2 = bias_corrections(group, step)
        lr = group["lr"]
        decay = group["weight_decay"] if group["adam_w_mode"] else 0.0
        clips = group["trust_ratio"] == "clip"
        bounds = group["trust_ratio_bounds"] or (0.0, math.inf)
        return {
            "decay": 1.0 - lr * decay if clips else 1.0,
            "step_size": lr,
            **moment_scalars(group, c2),
            "bias_ratio": c2 / c1,
            "direction_decay": 0.0 if clips else decay,
            "max_unorm": 1.0 if group["max_unorm"] is None else group["max_unorm"],
            **dict(zip(("ratio_low", "ratio_high"), bounds, strict=True)),
            "adapts": float(group["always_adapt"] or group["weight_decay"] > 0),
        }


def _ratio_text(group: Mapping[str, Any]) -> str | None:
    """The trust ratio's text; bitsandbytes has none for block-wise 8-bit state."""
    if group["compat"] == "none":
        return str(group["trust_ratio"])
    return None if group["optim_bits"] == 8 and group["block_wise"] else "clip_or_freeze"
