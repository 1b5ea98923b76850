"""Adam (Kingma & Ba 2015, arXiv:1412.6980): as torch.optim.Adam, decay is L2 by default."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from optfactory.config.peers import BitsandbytesPeer, TorchaoPeer, TorchPeer
from optfactory.optimizers.moments import (
    ADAM_OF_BITSANDBYTES,
    ADAM_OF_TORCH,
    MAX_MOMENT,
    MOMENT_SCALARS,
    MOMENTS,
    MomentsConfig,
    bias_corrections,
    moment_scalars,
)
from optfactory.rules.language import UpdateRule

ADAM = UpdateRule("adam", MOMENTS, MOMENT_SCALARS)
ADAM_AMSGRAD = UpdateRule("adam_amsgrad", (*MOMENTS, MAX_MOMENT), MOMENT_SCALARS)


class AdamConfig(MomentsConfig):
    """Adam; weight decay is added to the gradient (L2) unless adam_w_mode is true."""

    family: ClassVar[str] = "adam"
    torch_peer: ClassVar[TorchPeer] = ADAM_OF_TORCH
    bitsandbytes_peer: ClassVar[BitsandbytesPeer] = ADAM_OF_BITSANDBYTES
    torchao_peer: ClassVar[TorchaoPeer] = TorchaoPeer("Adam")

    adam_w_mode: bool = Field(
        default=False, description="true: decoupled decay (AdamW); false: L2, added to the gradient"
    )

    @classmethod
    def rule(cls, group: Mapping[str, Any]) -> UpdateRule:
        return ADAM_AMSGRAD if group["amsgrad"] else ADAM

    @classmethod
    def scalars(cls, group: Mapping[str, Any], step: Any) -> dict[str, Any]:
        c1, c2 = bias_corrections(group, step)
        lr = group["lr"]
        decoupled_decay = group["weight_decay"] if group["adam_w_mode"] else 0.0
        return {
            "decay": 1.0 - lr * decoupled_decay,
            "step_size": lr * c2 / c1,
            **moment_scalars(group, c2),
        }
