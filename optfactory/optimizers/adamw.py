"""AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101): Adam with decoupled weight decay."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from pydantic import Field

from optfactory.config.fields import Number
from optfactory.config.peers import BitsandbytesPeer, TorchaoPeer, TorchPeer
from optfactory.optimizers.adam import AdamConfig
from optfactory.optimizers.moments import ADAM_OF_BITSANDBYTES, ADAM_OF_TORCH


class AdamWConfig(AdamConfig):
    """AdamW; weight decay multiplies the parameter by 1 - lr * weight_decay before the step."""

    family: ClassVar[str] = "adamw"
    torch_peer: ClassVar[TorchPeer] = replace(ADAM_OF_TORCH, name="AdamW")
    bitsandbytes_peer: ClassVar[BitsandbytesPeer] = ADAM_OF_BITSANDBYTES
    torchao_peer: ClassVar[TorchaoPeer] = TorchaoPeer("AdamW")

    weight_decay: Number = Field(default=0.01, description="weight decay coefficient")
    adam_w_mode: bool = Field(
        default=True, description="true: decoupled decay (AdamW); false: L2, added to the gradient"
    )
