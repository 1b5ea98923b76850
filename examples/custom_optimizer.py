"""Add an optimizer from outside: Yogi (Zaheer et al. 2018, NeurIPS, Alg. 2).

    python examples/custom_optimizer.py

The schema and the rule text below are all there is. The names `yogi`, `yogi8bit`,
`paged_yogi8bit` and so on then work wherever a name does, on every backend: one native call
for all tensors, 8-bit and paged state, checkpoints. A package of your own registers its class for
good with an entry point:

    [project.entry-points."optfactory.optimizers"]
    yogi = "my_package.yogi:YogiConfig"
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from optfactory import build_optimizer
from optfactory.extend import (
    Betas,
    Number,
    OptimizerConfig,
    StateSpec,
    UpdateRule,
    bias_corrections,
    register,
)

# Reads the parameter p, the gradient g, the states and the scalars; assigns the states and the
# direction u. The step is p = p * decay - step_size * u.
YOGI = UpdateRule(
    "yogi",
    states=(StateSpec("exp_avg", signed=True), StateSpec("exp_avg_sq", signed=False)),
    scalars=("beta1", "one_minus_beta1", "one_minus_beta2", "eps_hat"),
    text="""
    exp_avg = fma(one_minus_beta1, g, beta1 * exp_avg);
    square = g * g;
    exp_avg_sq = fma(-one_minus_beta2 * sign(exp_avg_sq - square), square, exp_avg_sq);
    u = exp_avg / (sqrt(max(exp_avg_sq, 0)) + eps_hat);
    """,
)


@register
class YogiConfig(OptimizerConfig):
    """Yogi; the second moment changes by no more than a share of the gradient's square."""

    family: ClassVar[str] = "yogi"

    betas: Betas = (0.9, 0.999)
    eps: Number = 1e-3
    bias_correction: bool = True

    @classmethod
    def rule(cls, group: Mapping[str, Any]) -> UpdateRule:
        return YOGI

    @classmethod
    def scalars(cls, group: Mapping[str, Any], step: Any) -> dict[str, Any]:
        c1, c2 = bias_corrections(group, step)
        beta1, beta2 = group["betas"]
        return {
            "decay": 1.0 - group["lr"] * group["weight_decay"],
            "step_size": group["lr"] * c2 / c1,
            "beta1": beta1,
            "one_minus_beta1": 1.0 - beta1,
            "one_minus_beta2": 1.0 - beta2,
            "eps_hat": group["eps"] * c2,
        }


def train(name: str) -> float:
    """The loss of a small network after 200 steps, with this optimizer."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Tanh(), torch.nn.Linear(128, 64))
    x = torch.randn(256, 64)
    y = torch.roll(x, 1, dims=1).tanh()
    optimizer = build_optimizer(name, model, lr=3e-3, weight_decay=0.01)
    for _ in range(200):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
    print(f"{name:22} loss {loss.item():.4f}, state {optimizer.memory_report().state_bytes} bytes")
    return loss.item()


if __name__ == "__main__":
    for name in ("adamw", "yogi", "yogi8bit", "paged_yogi8bit"):
        train(name)
