"""A step runs on the stream where the gradient was made, and the host does not wait for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from optfactory import Optimizer2State, build_optimizer, get_optimizer_info
from optfactory.backends.cuda.cupy_driver import CupyModule
from tests.conftest import has_compiler
from tests.gpu.harness import (
    DEVICE,
    NAMES,
    SHAPES,
    busy,
    content,
    give,
    gradients,
    needs_gpu,
    parameters,
    train,
    trained,
)

pytestmark = [*needs_gpu, pytest.mark.usefixtures("small_pages")]

STEPS = 4


def _memories(name: str) -> list[dict[str, Any]]:
    if not get_optimizer_info(name).is_paged:
        return [{}]
    return [{"page_memory": "pinned"}, {"page_memory": "managed"}]


EVERY = [
    pytest.param(name, options, id="-".join([name, *options.values()]))
    for name in NAMES
    for options in _memories(name)
]


def _late_gradients(params: list[Tensor], step: int) -> None:
    """Gradients that are NaN until work queued on the current stream overwrites them."""
    grads = gradients(params, step)
    late = [torch.full_like(grad, torch.nan) for grad in grads]
    busy(0.005)
    for target, grad in zip(late, grads, strict=True):
        target.copy_(grad)
    give(params, late)


def _on_streams(name: str, streams: list[torch.cuda.Stream], **options: Any) -> Optimizer2State:
    """Trains with each step on the next stream; a stream waits for the one before it only."""
    params = parameters(DEVICE)
    optimizer = build_optimizer(name, params, **options)
    before = torch.cuda.current_stream(DEVICE)
    kept = []
    for step in range(STEPS):
        stream = streams[step % len(streams)]
        stream.wait_stream(before)
        with torch.cuda.stream(stream):
            _late_gradients(params, step)
            optimizer.step()
        kept.append([p.grad for p in params])  # so that no memory changes its stream meanwhile
        before = stream
    torch.cuda.synchronize()
    return optimizer


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(("name", "options"), EVERY)
def test_a_step_on_another_stream_waits_for_its_gradients_there(
    name: str, options: dict[str, Any], count: int
) -> None:
    expected = content(trained(name, parameters(DEVICE), STEPS, **options))
    for _ in range(3):
        streams = [torch.cuda.Stream(DEVICE) for _ in range(count)]
        assert content(_on_streams(name, streams, **options)) == expected


@pytest.mark.parametrize("name", ["adamw8bit", "lamb", "paged_lamb8bit"])
def test_what_follows_a_step_on_its_stream_sees_the_result(name: str) -> None:
    params = parameters(DEVICE)
    optimizer = trained(name, params, steps=1)
    stream = torch.cuda.Stream(DEVICE)
    stream.wait_stream(torch.cuda.current_stream(DEVICE))
    with torch.cuda.stream(stream):
        _late_gradients(params, 1)
        optimizer.step()
        seen = [p.detach().clone() for p in params]
    torch.cuda.synchronize()
    assert all(torch.equal(p, copy) for p, copy in zip(params, seen, strict=True))
    assert all(bool(p.isfinite().all()) for p in params)


# ---- the host does not wait -------------------------------------------------------------------


@pytest.fixture
def reset_sync_debug_mode() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize(("name", "options"), EVERY)
def test_a_warm_step_synchronizes_nothing(
    name: str, options: dict[str, Any], reset_sync_debug_mode: None
) -> None:
    """Nothing that torch does; the rest is seen by the next test."""
    params = parameters(DEVICE)
    optimizer = trained(name, params, steps=2, **options)
    steps = [gradients(params, step) for step in (2, 3)]
    torch.cuda.set_sync_debug_mode("error")
    for grads in steps:
        give(params, grads)
        optimizer.step()
    torch.cuda.set_sync_debug_mode("default")
    expected = trained(name, parameters(DEVICE), steps=4, **options)
    assert content(optimizer) == content(expected)


@pytest.mark.parametrize("name", [name for name in NAMES if "32bit" not in name])
def test_a_warm_step_returns_while_the_device_still_works(name: str) -> None:
    params = parameters(DEVICE)
    options = {"page_memory": "pinned"} if get_optimizer_info(name).is_paged else {}
    optimizer = trained(name, params, steps=2, **options)
    give(params, gradients(params, 2))
    torch.cuda.synchronize()
    busy(0.5)
    awake = torch.cuda.Event()
    awake.record()
    optimizer.step()
    assert not awake.query(), "the step waited for what was queued before it"
    torch.cuda.synchronize()


@pytest.mark.parametrize("name", ["adamw", "lamb8bit"])
def test_thousands_of_tensors_take_a_few_launches(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One launch a pass, and a few for the tables; a launch each would be thousands."""
    params = [torch.ones(64, device=DEVICE).requires_grad_() for _ in range(2000)]
    optimizer = build_optimizer(name, params)
    launches: list[str] = []
    launch = CupyModule.launch

    def counted(module: CupyModule, kernel: str, *rest: Any) -> None:
        launches.append(kernel)
        launch(module, kernel, *rest)

    monkeypatch.setattr(CupyModule, "launch", counted)
    for _ in range(3):
        give(params, [torch.ones_like(p) for p in params])
        launches.clear()
        optimizer.step()
    assert launches.count("optfactory_update") == 1
    assert len(launches) <= 10


# ---- several devices --------------------------------------------------------------------------


def _alone(name: str, device: torch.device | str, steps: int) -> list[Tensor]:
    params = parameters(device)
    trained(name, params, steps)
    return [p.detach().cpu() for p in params]


@pytest.mark.parametrize("name", ["adam", "adamw8bit", "lamb8bit", "paged_adam"])
@pytest.mark.parametrize("others", [["cpu"], ["cuda:1"], ["cpu", "cuda:1"]], ids="+".join)
def test_one_optimizer_for_several_devices(name: str, others: list[str]) -> None:
    if "cpu" in others and not has_compiler():
        pytest.skip("no C++ compiler for the native backend")
    if "cuda:1" in others and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    devices = [str(DEVICE), *others]
    groups = [parameters(device) for device in devices]
    optimizer = build_optimizer(name, [{"params": group} for group in groups])
    everything = [p for group in groups for p in group]
    for step in range(3):
        for group in groups:
            give(group, gradients(group, step))
        optimizer.step()
    assert all(optimizer.state[p]["step"] == 3 for p in everything)
    assert torch.cuda.current_device() == DEVICE.index
    for device, group in zip(devices, groups, strict=True):
        for p, want in zip(group, _alone(name, device, 3), strict=True):
            assert torch.equal(p.detach().cpu(), want), device


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_step_leaves_the_current_device_alone() -> None:
    params = parameters("cuda:1", SHAPES[:2])
    optimizer = trained("adam8bit", params, steps=1)
    with torch.cuda.device(0):
        train(optimizer, params, range(1, 2))
        assert torch.cuda.current_device() == 0
    torch.cuda.synchronize("cuda:1")
    assert all(optimizer.state[p]["step"] == 2 for p in params)
