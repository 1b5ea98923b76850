"""AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101): Adam with decoupled weight decay."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from optfactory.config.fields import Number
from optfactory.optimizers.adam import AdamConfig


class AdamWConfig(AdamConfig):
    """AdamW; weight decay multiplies the parameter by 1 - lr * weight_decay before the step."""

    family: ClassVar[str] = "adamw"

    weight_decay: Number = Field(default=0.01, description="weight decay coefficient")
    adam_w_mode: bool = Field(
        default=True, description="true: decoupled decay (AdamW); false: L2, added to the gradient"
    )
