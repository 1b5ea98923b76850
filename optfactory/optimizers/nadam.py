"""NAdam (Dozat 2016): Adam with Nesterov's momentum, as torch.optim.NAdam."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from optfactory.config.fields import Betas, Number
from optfactory.config.peers import TorchPeer
from optfactory.config.schema import STOCHASTIC_STATE, OptimizerConfig, StateRounding
from optfactory.optimizers.moments import MOMENTS
from optfactory.rules.language import UpdateRule

NADAM = UpdateRule(
    "nadam",
    MOMENTS,
    (
        *("beta1", "one_minus_beta1", "beta2", "one_minus_beta2", "eps_hat", "coupled_decay"),
        *("share_of_g", "share_of_avg"),
    ),
)

# The momentum of step t is beta1 * (1 - 0.96^(t * momentum_decay) / 2).
_LOG_BASE = math.log(0.96)
# Each term of the series for its product is less than half of the one before: 2^-40 is left.
_TERMS = 40


def _momentum(beta1: float, speed: float, step: Any) -> Any:
    return beta1 * (1.0 - 0.5 * math.exp(_LOG_BASE * speed) ** step)


def _momentum_product(beta1: float, speed: float, step: Any) -> Any:
    """The product of the momenta of all steps so far, from the step's number alone.

    With q = 0.96^momentum_decay, log(1 - q^k / 2) = -sum over n of q^(kn) / (n 2^n), and the sums
    over k are geometric: q^n (1 - q^(nt)) / (1 - q^n), or t where q is 1. So a resumed run needs no
    other number than its step, which may be a tensor.

    >>> round(_momentum_product(0.9, 4e-3, 1.0) / _momentum(0.9, 4e-3, 1.0), 9)
    1.0
    """
    logs = 0.0
    for n in range(1, _TERMS + 1):
        q = n * _LOG_BASE * speed
        runs = math.exp(q) * (1.0 - math.exp(q) ** step) / -math.expm1(q) if speed else step
        logs = logs - runs / (n * 2.0**n)
    return beta1**step * math.e**logs


def _kept_by_torch(group: Mapping[str, Any], step: float) -> dict[str, float]:
    beta1, speed = group["betas"][0], group["momentum_decay"]
    return {"mu_product": _momentum_product(beta1, speed, step)}


class NAdamConfig(OptimizerConfig):
    """NAdam; weight decay is added to the gradient (L2) unless it is decoupled."""

    family: ClassVar[str] = "nadam"
    torch_peer: ClassVar[TorchPeer] = TorchPeer(
        "NAdam", ("momentum_decay",), numbers=_kept_by_torch
    )

    state_rounding: StateRounding = STOCHASTIC_STATE

    lr: Number = Field(default=2e-3, description="learning rate")
    betas: Betas = Field(
        default=(0.9, 0.999), description="decay rates of the first and second moment, in [0, 1)"
    )
    eps: Number = Field(default=1e-8, description="added to the root of the second moment")
    momentum_decay: Number = Field(
        default=4e-3, description="how soon the momentum has grown from half of betas[0] to all"
    )
    decoupled_weight_decay: bool = Field(
        default=False, description="true: decoupled decay (AdamW); false: L2, added to the gradient"
    )

    @classmethod
    def rule(cls, group: Mapping[str, Any]) -> UpdateRule:
        return NADAM

    @classmethod
    def scalars(cls, group: Mapping[str, Any], step: Any) -> dict[str, Any]:
        lr, (beta1, beta2) = group["lr"], group["betas"]
        decoupled = group["weight_decay"] if group["decoupled_weight_decay"] else 0.0
        c2 = (1.0 - beta2**step) ** 0.5
        speed = group["momentum_decay"]
        now, ahead = (_momentum(beta1, speed, number) for number in (step, step + 1.0))
        product = _momentum_product(beta1, speed, step)
        of_g, of_avg = (1.0 - now) / (1.0 - product), ahead / (1.0 - product * ahead)
        both = of_g + of_avg  # in the step's size, as a mean of two numbers cannot overflow
        return {
            "decay": 1.0 - lr * decoupled,
            "step_size": lr * c2 * both,
            "beta1": beta1,
            "one_minus_beta1": 1.0 - beta1,
            "beta2": beta2,
            "one_minus_beta2": 1.0 - beta2,
            "eps_hat": group["eps"] * c2,
            "coupled_decay": group["weight_decay"] - decoupled,
            "share_of_g": of_g / both,
            "share_of_avg": of_avg / both,
        }
