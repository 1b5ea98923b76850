"""Tools of the framework tests: names, a small model, comparisons bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from optfactory import list_optimizers, optim
from tests.families import states_of
from tests.torch_api.harness import bits, is_paged

NAMES = list_optimizers()
CLASSES = {name: getattr(optim, name) for name in optim.__all__}
# One of each way to keep state, for what a framework does alike with all of them.
SAMPLE = ["adamw", "adamw8bit", "paged_adamw8bit", "lamb8bit"]
WIDTH = 64


def network() -> nn.Sequential:
    """Two weights with 8-bit state under 8-bit names, two biases without."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 128), nn.Tanh(), nn.Linear(128, WIDTH))


def batches(count: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, WIDTH, generator=generator) for _ in range(count)]


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    return nn.functional.mse_loss(model(batch), batch.roll(1, 1))


def weights(model: nn.Module) -> list[bytes]:
    """Every bit of a model's parameters."""
    return [bits(p) for p in model.parameters()]


def assert_close(model: nn.Module, expected: nn.Module, rtol: float = 1e-5) -> None:
    """The parameters agree as those of two implementations of one formula in float32 do."""
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=1e-6)


def rate_of(name: str) -> float:
    """A learning rate at which a few steps lower the loss; RMSprop's first steps are long."""
    return 1e-3 if "rmsprop" in name else 0.01


def one_cycle(optimizer: Optimizer) -> OneCycleLR:
    """A schedule of twelve steps, of the momentum too where there is one."""
    group = optimizer.param_groups[0]
    cycles = not {"betas", "momentum"}.isdisjoint(optimizer.defaults)
    return OneCycleLR(optimizer, 2 * group["lr"], total_steps=12, cycle_momentum=cycles)


def dtype_of(name: str) -> torch.dtype:
    """What stands for an element of state under a name."""
    narrow = {"16bit": torch.bfloat16, "8bit": torch.uint8}
    return next((kind for width, kind in narrow.items() if name.endswith(width)), torch.float32)


def assert_kept_as_named(optimizer: Optimizer, name: str) -> None:
    """The state of the weights has the width and the place that a name states."""
    name = name.lower()
    moments = [
        entries[key]
        for p, entries in optimizer.state.items()
        for state in states_of(name)
        for key in (state.name, f"{state.name}_q8")
        if p.ndim == 2 and key in entries
    ]
    assert moments
    assert {moment.dtype for moment in moments} == {dtype_of(name)}
    assert {is_paged(moment) for moment in moments} == {name.startswith("paged")}
