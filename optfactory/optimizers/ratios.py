"""What the optimizers share that scale the steps of each tensor by a ratio of norms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pydantic import Field, ValidationInfo, field_validator

from optfactory.config.fields import Bounds, Number
from optfactory.config.schema import OptimizerConfig

BOUND_SCALARS = ("ratio_low", "ratio_high", "adapts")
CLIP_SCALARS = ("max_unorm", *BOUND_SCALARS)


class RatioConfig(OptimizerConfig):
    """Hyperparameters of a trust ratio; a family says which ones it has, `clip` among them."""

    trust_ratio: str = Field(default="clip", description="clip: at most max_unorm * |p|")
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
        if value is not None and info.data.get("trust_ratio", "clip") != "clip":
            raise ValueError("max_unorm belongs to trust_ratio: clip; set that, or drop max_unorm")
        return value


def bound_scalars(group: Mapping[str, Any]) -> dict[str, Any]:
    """The bounds of a ratio, and whether there is one."""
    low, high = group["trust_ratio_bounds"] or (0.0, math.inf)
    adapts = float(group["always_adapt"] or group["weight_decay"] > 0)
    return {"ratio_low": low, "ratio_high": high, "adapts": adapts}


def clip_scalars(group: Mapping[str, Any], limit: float) -> dict[str, Any]:
    """Those of `clip`; `limit` stands for a max_unorm that is not given."""
    given = group["max_unorm"]
    return {"max_unorm": limit if given is None else given, **bound_scalars(group)}


def ratio_text(group: Mapping[str, Any]) -> str | None:
    """The trust ratio's text; bitsandbytes has none for block-wise 8-bit state."""
    if group["compat"] == "none":
        return str(group["trust_ratio"])
    return None if group["optim_bits"] == 8 and group["block_wise"] else "clip_or_freeze"
