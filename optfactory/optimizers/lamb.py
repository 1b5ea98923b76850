"""LAMB (You et al. 2020, arXiv:1904.00962): Adam whose step is scaled per tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field

from optfactory.config.fields import Number
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
from optfactory.optimizers.ratios import CLIP_SCALARS, RatioConfig, clip_scalars, ratio_text
from optfactory.rules.language import UpdateRule

LAMB_SCALARS = (*MOMENT_SCALARS, "bias_ratio", "direction_decay", *CLIP_SCALARS)

LAMB = UpdateRule("lamb", MOMENTS, LAMB_SCALARS, trust_ratio="lamb")
LAMB_AMSGRAD = UpdateRule("lamb_amsgrad", (*MOMENTS, MAX_MOMENT), LAMB_SCALARS, trust_ratio="lamb")


class LambConfig(RatioConfig, MomentsConfig):
    """LAMB; the step of each tensor is scaled by a trust ratio of norms, at 8 bits too."""

    family: ClassVar[str] = "lamb"
    bitsandbytes_peer: ClassVar[BitsandbytesPeer] = replace(ADAM_OF_BITSANDBYTES, norm=True)

    eps: Number = Field(default=1e-6, description="added to the root of the second moment")
    weight_decay: Number = Field(default=0.01, description="weight decay coefficient")
    trust_ratio: Literal["lamb", "clip"] = Field(
        default="lamb",
        description="lamb: |p| / |u|, the paper's; clip: at most max_unorm * |p| (bitsandbytes)",
    )

    @classmethod
    def rule(cls, group: Mapping[str, Any]) -> UpdateRule:
        rule = LAMB_AMSGRAD if group["amsgrad"] else LAMB
        return replace(rule, trust_ratio=ratio_text(group))

    @classmethod
    def scalars(cls, group: Mapping[str, Any], step: Any) -> dict[str, Any]:
        c1, c2 = bias_corrections(group, step)
        lr = group["lr"]
        decay = group["weight_decay"] if group["adam_w_mode"] else 0.0
        clips = group["trust_ratio"] == "clip"
        return {
            "decay": 1.0 - lr * decay if clips else 1.0,
            "step_size": lr,
            **moment_scalars(group, c2),
            "bias_ratio": c2 / c1,
            "direction_decay": 0.0 if clips else decay,
            **clip_scalars(group, 1.0),
        }
