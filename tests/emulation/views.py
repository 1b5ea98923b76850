"""Parameters and gradients that are views or lie beside inaccessible memory, against plain ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from optfactory import Optimizer2State, build_optimizer
from optfactory.backends.cuda.backend import CudaBackend
from tests.emulation.fenced import fenced
from tests.emulation.guarded import Guarded
from tests.emulation.harness import (
    Shape,
    assert_close_steps,
    assert_same_states,
    give_gradients,
    guard_states,
    held,
    on,
    set_gradient,
    values,
)
from tests.numerics.harness import gradient

UNUSED = 7.5

# Shapes with strides of views, each of a storage of its own.
VIEWS: dict[str, tuple[Shape, Shape]] = {
    "contiguous": ((64, 130), (130, 1)),
    "transposed": ((64, 130), (1, 64)),
    "columns": ((64, 130), (137, 1)),
    "every other row": ((64, 130), (260, 1)),
    "every third element": ((4099,), (3,)),
    "channels last": ((32, 16, 5, 3), (240, 1, 48, 16)),
    "reversed dimensions": ((33, 5, 60), (1, 33, 165)),
}


class Views:
    """Parameters and gradients that are views, and an optimizer of plain copies."""

    def __init__(self, name: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
        self.sums = name.startswith("lamb")
        self.guarded = Guarded()
        self.storages: list[tuple[Tensor, Tensor]] = []
        # A parameter's and its gradient's layout may differ.
        same_shape = [
            (shape, p, g)
            for shape, p in VIEWS.values()
            for other, g in VIEWS.values()
            if shape == other
        ]
        self.params = [
            nn.Parameter(self._view(values(shape, dtypes[0], i), strides))
            for i, (shape, strides, _) in enumerate(same_shape)
        ]
        self.grads = [
            self._view(torch.zeros(shape, dtype=dtypes[1]), strides)
            for shape, _, strides in same_shape
        ]
        plain = [p.detach().clone(memory_format=torch.contiguous_format) for p in self.params]
        self.viewing = build_optimizer(name, self.params)
        self.plain = build_optimizer(name, [p.requires_grad_() for p in plain])
        guard_states(self.viewing, self.guarded, [i % 2 for i in range(len(plain))])

    def _view(self, tensor: Tensor, strides: Shape) -> Tensor:
        size = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, strides, strict=True))
        storage = self.guarded.empty("storage", (size,), tensor.dtype, 1).fill_(UNUSED)
        unused = torch.ones(size, dtype=torch.bool)
        unused.as_strided(tensor.shape, strides).fill_(False)
        self.storages.append((storage, unused))
        first = storage.storage_offset()
        return storage.as_strided(tensor.shape, strides, first).copy_(tensor)

    def new_gradients(self, step: int) -> None:
        plain = held(self.plain)
        for index, (p, q, grad) in enumerate(zip(self.params, plain, self.grads, strict=True)):
            grad.copy_(gradient(tuple(grad.shape), grad.dtype, 100 * step + index))
            set_gradient(p, grad)
            set_gradient(q, grad.clone(memory_format=torch.contiguous_format))

    def check(self) -> None:
        self.guarded.check()
        for storage, unused in self.storages:
            assert storage[unused].eq(UNUSED).all()

    def step(self, backend: CudaBackend) -> None:
        """One step of both; raises AssertionError for all that a view must not change."""
        before = [p.detach().clone() for p in self.params]
        kept = [grad.clone() for grad in self.grads]
        with on(backend):
            self.viewing.step()
            self.plain.step()
        assert_same_states(self.viewing, self.plain)
        for p, q, old in zip(self.params, held(self.plain), before, strict=True):
            # Threads take other elements of a view, and so sum norms in another order.
            assert_close_steps(p, q, old)
            assert self.sums or torch.equal(p, q), f"{tuple(p.shape)} with {p.stride()} differs"
        for grad, unchanged in zip(self.grads, kept, strict=True):
            assert torch.equal(grad, unchanged), "a gradient was changed"
        self.check()


class Fences:
    """An optimizer all of whose memory lies beside inaccessible pages, and one of plain copies."""

    SHAPES: tuple[Shape, ...] = ((1,), (255,), (256,), (4099,), (8192,), (33, 300), (70, 64))

    def __init__(self, name: str, dtype: torch.dtype, side: str) -> None:
        self.start = [values(shape, dtype, i) for i, shape in enumerate(self.SHAPES)]
        self.params = [fenced(p, side).requires_grad_() for p in self.start]
        self.fenced = build_optimizer(name, self.params, min_8bit_size=1)
        copies = [p.clone().requires_grad_() for p in self.start]
        self.plain = build_optimizer(name, copies, min_8bit_size=1)
        self._fence_states(self.fenced, side)

    def _fence_states(self, optimizer: Optimizer2State, side: str) -> None:
        optimizer.init_states()
        for p, state in list(optimizer.state.items()):
            optimizer.state[p] = {key: fenced(tensor, side) for key, tensor in state.items()}
            p.grad = fenced(torch.zeros_like(p), side)

    def step(self, backend: CudaBackend, step: int) -> None:
        """One step of both, which must do the same."""
        give_gradients(self.plain, step)
        before = [p.detach().clone() for p in self.params]
        with torch.no_grad():
            for p, q in zip(self.params, held(self.plain), strict=True):
                p.grad.copy_(q.grad)
        with on(backend):
            self.fenced.step()
            self.plain.step()
        for p, q, old in zip(self.params, held(self.plain), before, strict=True):
            assert_close_steps(p, q, old)
