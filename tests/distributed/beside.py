"""Training under an engine beside the same in one process, which gets the engine's gradients.

Sums over processes round otherwise than those of one, and rules amplify that where gradients are
small. So the parameters must be the same bits, of the same gradients; and the gradients must be
near those of one process.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from optfactory import build_optimizer
from tests.distributed.harness import whole
from tests.distributed.nets import inputs, net

# One of each way to keep state; options that need norms, or a decision, of all processes.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw8bit": ("adamw8bit", {}),
    "lamb8bit": ("lamb8bit", {}),
    "adamw": ("adamw", {}),
    "lamb": ("lamb", {}),
    "paged": ("paged_adamw8bit", {}),
    "clipped": ("adamw8bit", {"percentile_clipping": 5}),
    "skips": ("adamw8bit", {"nonfinite": "skip_step"}),
}


@dataclass
class Beside:
    """An engine's model and a plain one, each with its optimizer.

    Attributes:
        model, single: of the same parameters in the same order.
        optimizer, alone: their optimizers.
        near: how far gradients may be from those of one process, relative to the greatest.
        loss: of a model for the data of some seed; processes have data of their own.
        wrong: what differed, and where.
    """

    model: nn.Module
    single: nn.Module
    optimizer: Optimizer
    alone: Optimizer
    near: float = 1e-4
    loss: Callable[[nn.Module, int], Tensor] = lambda model, seed: model(inputs(seed))
    wrong: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module, name: str, single: nn.Module | None = None, **given: Any) -> Any:
        """Both with an optimizer of a name; `near` and `loss` may be given beside options."""
        own = {key: given.pop(key) for key in ("near", "loss") if key in given}
        alone = net() if single is None else single
        optimizers = [build_optimizer(name, m, **{"lr": 1e-2, **given}) for m in (model, alone)]
        return cls(model, alone, *optimizers, **own)

    def pairs(self) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
        """The parameters of both with their names."""
        for (name, p), q in zip(
            self.model.named_parameters(), self.single.parameters(), strict=True
        ):
            yield name.removeprefix("module."), p, q

    def backward(self, seeds: list[int], mine: int) -> None:
        """Gradients of the mean over some data, of which this process has a part."""
        self.optimizer.zero_grad()
        self.loss(self.model, seeds[mine]).backward()
        self.alone.zero_grad()
        for seed in seeds:
            (self.loss(self.single, seed) / len(seeds)).backward()

    def compare_gradients(self) -> None:
        """Note which are not near, and give the plain model those of the engine."""
        for name, p, q in self.pairs():
            if (p.grad is None) != (q.grad is None):
                self.wrong.append(f"{name}: gradient {p.grad is not None}, {q.grad is not None}")
            elif p.grad is not None:
                found = whole(p.grad)
                if (found - q.grad).abs().max() > self.near * q.grad.abs().max():
                    self.wrong.append(f"{name}: gradient")
                q.grad = found.clone()

    def step(self) -> None:
        """A step of both, and a note of parameters that differ."""
        self.optimizer.step()
        self.alone.step()
        self.compare()

    def compare(self) -> None:
        """Note which parameters differ."""
        self.wrong += [n for n, p, q in self.pairs() if not torch.equal(whole(p).detach(), q)]

    def train(self, seeds: range, rank: int, world: int) -> Beside:
        """Steps on data of which each process has its own; all have the same for a world of 1."""
        for seed in seeds:
            self.backward([10 * seed + n for n in range(world)], rank % world)
            self.compare_gradients()
            self.step()
        return self


class Collectives(TorchDispatchMode):
    """Notes the collectives of a block by name and number of processes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in func.__name__:
            self.found[func.__name__.split(".")[0], _size_of_group(args)] += 1
        return func(*args, **(kwargs or {}))


def _size_of_group(arguments: tuple[Any, ...]) -> int:
    for value in arguments:
        if isinstance(value, torch.ScriptObject):
            try:
                return dist.ProcessGroup.unbox(value).size()
            except (RuntimeError, ValueError, TypeError):
                continue
    names = [value for value in arguments if isinstance(value, str)]
    return dist.distributed_c10d._resolve_process_group(names[-1]).size()


@contextmanager
def small_pages() -> Iterator[None]:
    """Small tensors are paged too, under paged names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("optfactory.memory.placement.PAGED_MIN_NUMEL", 1000)
        yield
