"""CUDA graphs: a captured step trains on as an eager one does, with new data and learning rates."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from optfactory import Optimizer2State, build_optimizer
from optfactory.errors import BackendError
from tests.gpu.harness import (
    DEVICE,
    content,
    give,
    gradients,
    needs_gpu,
    parameters,
    train,
    trained,
)

pytestmark = needs_gpu

NAMES = ["adam", "adamw8bit", "lamb", "lamb8bit"]
WARM_UP = 2


def build(name: str, **options: Any) -> tuple[list[Tensor], Tensor, Optimizer2State]:
    """Parameters, their learning rate on the device, and the optimizer."""
    params, lr = parameters(DEVICE), torch.tensor(1e-2, device=DEVICE)
    return params, lr, build_optimizer(name, params, lr=lr, capturable=True, **options)


def warm_up(params: list[Tensor], optimizer: Optimizer2State) -> None:
    """Steps on a side stream, as torch.cuda.graph asks for."""
    stream = torch.cuda.Stream(DEVICE)
    stream.wait_stream(torch.cuda.current_stream(DEVICE))
    with torch.cuda.stream(stream):
        train(optimizer, params, range(WARM_UP))
    torch.cuda.current_stream(DEVICE).wait_stream(stream)


def captured(params: list[Tensor], optimizer: Optimizer2State) -> torch.cuda.CUDAGraph:
    """A step on gradients that are where the parameters' gradients are now."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph


def refill(params: list[Tensor], step: int) -> None:
    for p, grad in zip(params, gradients(params, step), strict=True):
        assert p.grad is not None
        p.grad.copy_(grad)


@pytest.mark.parametrize("name", NAMES)
def test_replays_and_eager_steps_train_as_eager_steps_alone(name: str) -> None:
    params, lr, optimizer = build(name)
    others, other_lr, eager = build(name)
    warm_up(params, optimizer)
    train(eager, others, range(WARM_UP))
    assert content(optimizer) == content(eager)
    give(params, gradients(params, 0))
    graph = captured(params, optimizer)
    assert content(optimizer) == content(eager)  # a capture runs nothing
    for step in range(WARM_UP, WARM_UP + 8):
        rate = 1e-2 / (1 + step)
        lr.fill_(rate)
        other_lr.fill_(rate)
        give(others, gradients(others, step))
        eager.step()
        if step % 4 == 3:  # an eager step between replays, on other gradient tensors
            kept = [p.grad for p in params]
            give(params, gradients(params, step))
            optimizer.step()
            give(params, [grad for grad in kept if grad is not None])
        else:
            refill(params, step)
            graph.replay()
        assert content(optimizer) == content(eager), step
    assert all(float(optimizer.state[p]["step"]) == WARM_UP + 8 for p in params)


@pytest.mark.parametrize("name", NAMES)
def test_a_capturable_step_is_that_of_the_host_within_rounding(name: str) -> None:
    """Scalars are computed on the device in float64; powers of beta may differ in the last bit."""
    params, others = parameters(DEVICE), parameters(DEVICE)
    trained(name, params, steps=5, capturable=True)
    trained(name, others, steps=5)
    for p, want in zip(params, others, strict=True):
        torch.testing.assert_close(p, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_forward_backward_and_step_in_one_graph(name: str) -> None:
    """Elementwise, so that the gradients are the same to the bit in a graph and outside."""
    results = []
    data = [torch.linspace(-1, 1, 300, device=DEVICE) * step for step in range(1, 9)]
    for use_graph in (False, True):
        params, _, optimizer = build(name)
        inputs = torch.empty(300, device=DEVICE)

        def train_on(inputs: Tensor = inputs, params: Any = params, optimizer: Any = optimizer):
            optimizer.zero_grad(set_to_none=True)
            loss = (params[0] * inputs).sin().sum() + params[1].square().sum()
            loss.backward()
            optimizer.step()

        stream = torch.cuda.Stream(DEVICE)
        stream.wait_stream(torch.cuda.current_stream(DEVICE))
        with torch.cuda.stream(stream):
            for values in data[:3]:
                inputs.copy_(values)
                train_on()
        torch.cuda.current_stream(DEVICE).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        if use_graph:
            with torch.cuda.graph(graph):
                train_on()
        for values in data[3:]:
            inputs.copy_(values)
            if use_graph:
                graph.replay()
            else:
                train_on()
        results.append(content(optimizer))
    assert results[0] == results[1]


def test_two_graphs_of_one_optimizer() -> None:
    """Each has gradients of its own; they may be replayed in any order."""
    params, _, optimizer = build("adamw8bit")
    others, _, eager = build("adamw8bit")
    warm_up(params, optimizer)
    train(eager, others, range(WARM_UP))
    sides = []
    for _ in range(2):
        give(params, gradients(params, 0))
        sides.append(([p.grad for p in params], captured(params, optimizer)))
    for step, side in enumerate((0, 1, 1, 0), start=WARM_UP):
        grads, graph = sides[side]
        for target, grad in zip(grads, gradients(params, step), strict=True):
            assert target is not None
            target.copy_(grad)
        graph.replay()
        train(eager, others, range(step, step + 1))
        assert content(optimizer) == content(eager)


def test_a_checkpoint_after_replays_goes_on() -> None:
    params, _, optimizer = build("adam8bit")
    warm_up(params, optimizer)
    give(params, gradients(params, 0))
    graph = captured(params, optimizer)
    refill(params, 2)
    graph.replay()
    saved = copy.deepcopy(optimizer.state_dict())
    others = [p.detach().clone().requires_grad_() for p in params]
    for capturable in (True, False):
        resumed = build_optimizer("adam8bit", others, lr=1e-2, capturable=capturable)
        resumed.load_state_dict(saved)
        assert all(float(resumed.state[p]["step"]) == 3 for p in others)
        assert resumed.state[others[0]]["step"].device.type == ("cuda" if capturable else "cpu")


# ---- refused ----------------------------------------------------------------------------------


def _refused_capture(optimizer: Optimizer2State, match: str) -> None:
    other = torch.zeros(3, device=DEVICE)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        other.add_(1)  # a graph of nothing would be a warning
        with pytest.raises(BackendError, match=match):
            optimizer.step()


def test_a_capture_without_warm_up_is_refused_and_changes_nothing() -> None:
    params, _, optimizer = build("adamw8bit")
    others, _, fresh = build("adamw8bit")
    give(params, gradients(params, 0))
    _refused_capture(optimizer, "before the capture")
    train(optimizer, params, range(2))
    train(fresh, others, range(2))
    assert content(optimizer) == content(fresh)


def test_a_capture_with_other_gradients_than_before_is_refused() -> None:
    """The tables of a step are made for the parameters that have gradients."""
    params, _, optimizer = build("adamw8bit")
    warm_up(params, optimizer)
    before = content(optimizer)
    params[0].grad = None
    _refused_capture(optimizer, "before the capture")
    assert content(optimizer) == before


def test_a_capture_needs_capturable() -> None:
    """Scalars of the host would be frozen into the graph."""
    params = parameters(DEVICE)
    optimizer = trained("adamw8bit", params, steps=WARM_UP)
    before = content(optimizer)
    _refused_capture(optimizer, "capturable")
    assert content(optimizer) == before
