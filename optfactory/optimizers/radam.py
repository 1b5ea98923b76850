"""RAdam (Liu et al. 2020, arXiv:1908.03265): as torch.optim.RAdam, decay is L2 by default."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from optfactory.config.fields import Betas, Number
from optfactory.config.peers import TorchPeer
from optfactory.config.schema import STOCHASTIC_STATE, OptimizerConfig, StateRounding
from optfactory.optimizers.moments import MOMENTS
from optfactory.rules.language import UpdateRule

RADAM = UpdateRule(
    "radam",
    MOMENTS,
    (
        *("beta1", "one_minus_beta1", "beta2", "one_minus_beta2", "eps", "coupled_decay"),
        "adapts",
    ),
)

# From this length of the approximated average on, the variance is tractable (torch).
_LEAST_LENGTH = 5.0


class RAdamConfig(OptimizerConfig):
    """RAdam; weight decay is added to the gradient (L2) unless it is decoupled."""

    family: ClassVar[str] = "radam"
    torch_peer: ClassVar[TorchPeer] = TorchPeer(
        "RAdam", ("betas", "decoupled_weight_decay"), ("amsgrad", "momentum_decay")
    )

    state_rounding: StateRounding = STOCHASTIC_STATE

    betas: Betas = Field(
        default=(0.9, 0.999), description="decay rates of the first and second moment, in [0, 1)"
    )
    eps: Number = Field(default=1e-8, description="added to the root of the second moment")
    decoupled_weight_decay: bool = Field(
        default=False, description="true: decoupled decay (AdamW); false: L2, added to the gradient"
    )

    @classmethod
    def rule(cls, group: Mapping[str, Any]) -> UpdateRule:
        return RADAM

    @classmethod
    def scalars(cls, group: Mapping[str, Any], step: Any) -> dict[str, Any]:
        lr, (beta1, beta2) = group["lr"], group["betas"]
        decoupled = group["weight_decay"] if group["decoupled_weight_decay"] else 0.0
        adapts, rectified = rectification(beta2, step)
        return {
            "decay": 1.0 - lr * decoupled,
            "step_size": lr * (rectified + (1.0 - adapts)) / (1.0 - beta1**step),
            "beta1": beta1,
            "one_minus_beta1": 1.0 - beta1,
            "beta2": beta2,
            "one_minus_beta2": 1.0 - beta2,
            "eps": group["eps"],
            "coupled_decay": group["weight_decay"] - decoupled,
            "adapts": adapts,
        }


def rectification(beta2: float, step: Any) -> tuple[Any, Any]:
    """Whether a step adapts (1 or 0), and then r_t * sqrt(1 - beta2^t), else 0 (Alg. 2, line 7 on).

    Numbers and tensors alike, so that there is no branch.

    >>> rectification(0.999, 5.0), rectification(0.999, 6.0)[0], rectification(0.5, 100.0)
    ((0.0, 0.0), 1.0, (0.0, 0.0))
    """
    longest = 2.0 / (1.0 - beta2) - 1.0
    if longest <= _LEAST_LENGTH:
        return 0.0, 0.0
    c2 = 1.0 - beta2**step
    length = longest - 2.0 * step * beta2**step / c2
    adapts = (length > _LEAST_LENGTH) * 1.0
    # Where a step does not adapt, the root is of 0: its square may be negative there.
    squared = (length - 4.0) * (length - 2.0) * longest * c2
    return adapts, (adapts * squared / ((longest - 4.0) * (longest - 2.0) * length)) ** 0.5
