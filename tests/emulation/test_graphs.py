"""Steps that a CUDA graph captures, and their replays among other steps."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from optfactory import Optimizer2State, build_optimizer
from optfactory.backends.cuda.backend import CudaBackend
from optfactory.backends.cuda.tables import LiveTable
from optfactory.errors import BackendError
from tests.emulation.graphs import Graph, GraphDriver
from tests.emulation.harness import (
    Shape,
    assert_same,
    emulator,
    give_gradients,
    held,
    on,
    values,
)
from tests.torch_api.harness import snapshot
from tests.unit.harness import needs_compiler

pytestmark = needs_compiler

SHAPES: list[Shape] = [(300,), (70, 64), (33, 300)]
OPTIONS: dict[str, dict[str, Any]] = {
    "adamw": {"name": "adamw"},
    "amsgrad": {"name": "adam", "amsgrad": True, "weight_decay": 0.1},
    "adamw8bit": {"name": "adamw8bit"},
    "lamb": {"name": "lamb"},
    "lamb8bit": {"name": "lamb8bit", "trust_ratio": "clip"},
}


@pytest.fixture
def spoilt_memory() -> Iterator[None]:
    """torch.empty gives NaN, so that numbers which nobody wrote show."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def build(options: dict[str, Any], **asked: Any) -> Optimizer2State:
    params = [values(shape, torch.float32, i).requires_grad_() for i, shape in enumerate(SHAPES)]
    groups = [{"params": params[:1], "lr": torch.tensor(0.01)}, {"params": params[1:]}]
    return build_optimizer(options, groups, **asked)


def train(optimizers: tuple[Optimizer2State, ...], steps: range) -> None:
    for step in steps:
        for optimizer in optimizers:
            give_gradients(optimizer, step)
            optimizer.step()


def test_a_capture_without_state_or_tables_changes_nothing() -> None:
    backend, driver = emulator()
    with on(backend):
        optimizer = build({"name": "adam8bit"}, capturable=True)
        give_gradients(optimizer, 0)
        last = held(optimizer)[-1]

        def refused() -> None:
            before = snapshot(optimizer)
            driver.is_capturing = True
            with pytest.raises(BackendError, match="a few steps before the capture"):
                optimizer.step()
            driver.is_capturing = False
            assert snapshot(optimizer) == before

        refused()
        optimizer.init_states()
        refused()
        optimizer.step()
        last.grad = None  # tables are made for the parameters that have gradients
        refused()


def test_a_step_with_host_scalars_is_not_captured() -> None:
    """Its graph would repeat one step's scalars for ever, and never count a step."""
    backend, driver = emulator()
    with on(backend):
        optimizer = build({"name": "adam8bit"})
        train((optimizer,), range(2))
        before = snapshot(optimizer)
        driver.is_capturing = True
        with pytest.raises(BackendError, match="capturable"):
            optimizer.step()
    assert snapshot(optimizer) == before


class Pair:
    """An optimizer whose steps are captured and replayed, beside one that is only stepped."""

    def __init__(self, driver: GraphDriver, options: dict[str, Any]) -> None:
        self.driver = driver
        self.optimizer = build(options, capturable=True)
        self.plain = build(options, capturable=True)
        self.found_inf = torch.zeros(())

    def capture(self, step: int) -> tuple[Graph, list[Tensor]]:
        """A graph and the gradients that it reads."""
        grads = [torch.zeros_like(p) for p in held(self.optimizer)]
        for p, grad in zip(held(self.optimizer), grads, strict=True):
            p.grad = grad
        self.fill(grads, step)
        self.optimizer.found_inf = self.found_inf
        graph = self.driver.capture(self.optimizer.step)
        del self.optimizer.found_inf
        self.plain.step()
        return graph, grads

    def fill(self, grads: list[Tensor], step: int) -> None:
        """The same new gradients in a graph's buffers and for the other optimizer."""
        give_gradients(self.plain, step)
        for grad, q in zip(grads, held(self.plain), strict=True):
            grad.copy_(q.grad)


@pytest.mark.parametrize("label", OPTIONS)
def test_replays_are_steps(label: str, spoilt_memory: None) -> None:
    """Two graphs, with steps of other gradients between their replays."""
    driver = GraphDriver()
    with on(CudaBackend(driver)):
        pair = Pair(driver, OPTIONS[label])
        train((pair.optimizer, pair.plain), range(2))
        graphs = [pair.capture(step) for step in (10, 11)]
        assert_same(pair.optimizer, pair.plain)
        for step in range(20, 29):
            if step % 3 == 2:
                train((pair.optimizer, pair.plain), range(step, step + 1))
                continue
            graph, grads = graphs[step % 3]
            pair.fill(grads, step)
            graph.replay()
            pair.plain.step()
            assert_same(pair.optimizer, pair.plain)
    assert all(state["step"] == 13 for state in pair.optimizer.state.values())


def test_replays_take_the_lr_of_their_time() -> None:
    driver = GraphDriver()
    with on(CudaBackend(driver)):
        pair = Pair(driver, OPTIONS["adamw8bit"])
        train((pair.optimizer, pair.plain), range(1))
        graph, grads = pair.capture(1)
        for step, rate in enumerate((0.1, 0.001, 0.0), 2):
            for optimizer in (pair.optimizer, pair.plain):
                optimizer.param_groups[0]["lr"].fill_(rate)
            pair.fill(grads, step)
            graph.replay()
            pair.plain.step()
            assert_same(pair.optimizer, pair.plain)


@pytest.mark.parametrize("label", OPTIONS)
def test_replays_skip_bad_gradients(label: str) -> None:
    driver = GraphDriver()
    with on(CudaBackend(driver)):
        pair = Pair(driver, OPTIONS[label])
        train((pair.optimizer, pair.plain), range(1))
        graph, grads = pair.capture(1)
        for grad in grads:
            grad.fill_(float("inf"))
        pair.found_inf.fill_(1.0)
        before = snapshot(pair.optimizer)
        graph.replay()
        assert snapshot(pair.optimizer) == before
        pair.found_inf.fill_(0.0)
        pair.fill(grads, 2)
        graph.replay()
        pair.plain.step()
    assert_same(pair.optimizer, pair.plain)


def test_tables_of_graphs_live_as_long_as_the_parameters() -> None:
    def tables() -> int:
        gc.collect()
        return sum(type(item) is LiveTable for item in gc.get_objects())

    before, driver = tables(), GraphDriver()
    with on(CudaBackend(driver)):
        optimizer = build(OPTIONS["adamw"], capturable=True)
        train((optimizer,), range(1))
        for _ in range(2):
            driver.capture(optimizer.step)
    params = held(optimizer)
    assert tables() == before + 3  # the bucket's own, and one for each graph
    driver.graph = Graph()
    del optimizer
    assert tables() == before + 3  # a graph goes on using the bucket's states
    params.clear()
    assert tables() == before


def test_a_capture_in_which_the_host_waits_is_noticed() -> None:
    with pytest.raises(AssertionError, match="the host waits"):
        GraphDriver().capture(torch.ones(()).item)
