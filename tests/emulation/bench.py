"""Guarded parameters that step on the emulator, compared with references and the native backend."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from optfactory import build_optimizer, get_optimizer_info
from optfactory.backends.cuda.backend import CudaBackend
from tests.emulation.guarded import Guarded, poison
from tests.emulation.harness import (
    NATIVE,
    Case,
    Shape,
    assert_close_steps,
    assert_same,
    assert_same_states,
    copy_training,
    guard_states,
    held,
    is_same,
    on,
    set_gradient,
    values,
)
from tests.families import suited
from tests.numerics.harness import Twin, gradient

# Elements by which parameter, gradient and states are off alignment: each alone, and all.
OFFSETS = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (3, 7, 5)]


class Bench:
    """Guarded parameters on the emulator, beside plain ones on the native backend.

    Every shape comes with every offset, all in one optimizer, so that buckets have many tensors.
    """

    def __init__(
        self,
        case: Case,
        dtypes: tuple[torch.dtype, torch.dtype],
        shapes: list[Shape],
        cuda: CudaBackend,
        **asked: Any,
    ) -> None:
        self.case, self.cuda, self.gradient_dtype = case, cuda, dtypes[1]
        self.guarded = Guarded()
        shapes = suited(case.family, shapes)
        self.layout = [(shape, offsets) for shape in shapes for offsets in OFFSETS]
        self.params = [
            self.guarded.copy(f"p{i}", values(shape, dtypes[0], i), offsets[0]).requires_grad_()
            for i, (shape, offsets) in enumerate(self.layout)
        ]
        self.grads = [
            self.guarded.empty(f"g{i}", shape, dtypes[1], offsets[1])
            for i, (shape, offsets) in enumerate(self.layout)
        ]
        # A learning rate whose steps show in bfloat16; those of LARS are small shares of norms.
        usual = get_optimizer_info(case.family).defaults["lr"]
        rate = 0.01 if usual < 0.1 else 10 * usual
        asked = case.asked | {"min_8bit_size": 1, "lr": rate} | asked
        self.twin = Twin(case.family, self.params, **asked)
        self.optimizer = self.twin.optimizer
        guard_states(self.optimizer, self.guarded, [offsets[2] for _, offsets in self.layout])
        self.optimizer.init_states()  # the plan gets the guarded states
        peers = [p.detach().clone().requires_grad_() for p in self.params]
        self.native = build_optimizer(case.family, peers, **asked)
        self.native.init_states()
        for p, grad in zip(self.params + peers, self.grads * 2, strict=True):
            set_gradient(p, grad)

    def compile(self) -> None:
        """Compile for both backends at once: compilers are processes of their own."""
        with ThreadPoolExecutor() as pool:
            work = [
                pool.submit(backend.prepare, optimizer._current_plan().gather())
                for backend, optimizer in ((self.cuda, self.optimizer), (NATIVE, self.native))
            ]
            for done in work:
                done.result()

    def new_gradients(self, seed: int) -> None:
        """Fill the gradients anew, where they are."""
        for index, (grad, (shape, _)) in enumerate(zip(self.grads, self.layout, strict=True)):
            grad.copy_(gradient(shape, self.gradient_dtype, 1000 * seed + index))

    def poison_outputs(self) -> None:
        """Spoil what kernels must write before they read it: norms and ratios."""
        for bucket in self.optimizer._current_plan().gather():
            if bucket.tables is not None:
                poison(bucket.tables.static.partial_sums)
                poison(bucket.tables.static.ratios)

    def step(self) -> None:
        """One step on the emulator, compared with the reference."""
        kept = [grad.clone() for grad in self.grads]
        self.poison_outputs()
        try:
            with on(self.cuda):
                self.twin.step(0, self.grads)
        finally:
            self.guarded.check()  # wrong results may have this cause, which tells more
        for grad, before in zip(self.grads, kept, strict=True):
            assert is_same(grad, before), "a gradient was changed"

    def compare(self, before: list[Tensor]) -> None:
        """The native step gives the same bits; where norms take part, those of the states."""
        with on(NATIVE):
            self.native.step()
        if self.case.is_elementwise:
            assert_same(self.optimizer, self.native)
            return
        assert_same_states(self.optimizer, self.native)
        for p, q, old in zip(self.params, held(self.native), before, strict=True):
            assert_close_steps(p, q, old)
        copy_training(self.optimizer, self.native)

    def before(self) -> list[Tensor]:
        """Copies of the parameters."""
        return [p.detach().clone() for p in self.params]
