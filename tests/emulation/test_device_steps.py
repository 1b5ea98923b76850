"""Steps and scalars on the device, as CUDA graphs need them, give what host scalars give."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from optfactory import Optimizer2State, build_optimizer
from optfactory.backends.reference.backend import ReferenceBackend
from tests.emulation.harness import Shape, emulator, give_gradients, held, on, values
from tests.unit.harness import needs_compiler

pytestmark = needs_compiler

SHAPES: list[Shape] = [(300,), (70, 64), (33, 300)]
OPTIONS: dict[str, dict[str, Any]] = {
    "adam": {"name": "adam", "weight_decay": 0.1},
    "amsgrad": {"name": "adam", "amsgrad": True},
    "adamw8bit": {"name": "adamw8bit"},
    "uncorrected": {"name": "adamw8bit", "bias_correction": False},
    "lamb": {"name": "lamb"},
    "lamb8bit": {"name": "lamb8bit", "trust_ratio": "clip", "max_unorm": 0.5},
}
# The power in the bias correction may be rounded otherwise by torch than by Python.
NEARLY = {"rtol": 2.0**-20, "atol": 2.0**-26}


@pytest.fixture
def spoilt_memory() -> Iterator[None]:
    """torch.empty gives NaN, so that numbers which nobody wrote show."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def build(options: dict[str, Any], **asked: Any) -> Optimizer2State:
    params = [values(shape, torch.float32, i).requires_grad_() for i, shape in enumerate(SHAPES)]
    return build_optimizer({"lr": 0.01, **options}, params, **asked)


def pair(options: dict[str, Any]) -> tuple[Optimizer2State, Optimizer2State]:
    """An optimizer with steps on the device and its peer with steps on the host."""
    return build(options, capturable=True), build(options)


def train(optimizers: Sequence[Optimizer2State], steps: range) -> None:
    for step in steps:
        for optimizer in optimizers:
            give_gradients(optimizer, step)
            optimizer.step()


def assert_nearly_same(one: Optimizer2State, other: Optimizer2State) -> None:
    for p, q in zip(held(one), held(other), strict=True):
        torch.testing.assert_close(p, q, **NEARLY)
        for key, tensor in one.state[p].items():
            if tensor.dtype == torch.uint8:
                assert (tensor != other.state[q][key]).float().mean() < 1e-3
            else:
                torch.testing.assert_close(tensor, other.state[q][key], **NEARLY)
        assert one.state[p]["step"] == other.state[q]["step"]


@pytest.mark.parametrize("label", OPTIONS)
def test_results_are_those_of_host_scalars(label: str, spoilt_memory: None) -> None:
    with on(emulator()[0]):
        device, host = pair(OPTIONS[label])
        train((device, host), range(4))
    assert_nearly_same(device, host)


@pytest.mark.parametrize("label", OPTIONS)
def test_scalars_are_the_hosts_at_any_step(label: str, spoilt_memory: None) -> None:
    with on(emulator()[0]):
        device, _ = pair(OPTIONS[label])
        train((device,), range(1))
        for bucket in device._current_plan().gather():
            for step in (1, 2, 3, 10, 1000, 10**6):
                steps = torch.full((len(bucket.slots),), float(step), dtype=torch.float64)
                rows, indices = bucket.scalar_rows(steps.tolist())
                wanted = np.asarray(rows, np.float32)[indices]
                got = bucket.device_scalars(steps).numpy()
                np.testing.assert_array_max_ulp(got, wanted, maxulp=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("capturable", [True, False])
@pytest.mark.parametrize("name", ["adamw", "lamb8bit"])
def test_an_lr_changed_in_place_is_used(name: str, capturable: bool, dtype: torch.dtype) -> None:
    rates = [0.01, 0.003, 0.0, 0.05]
    lr = torch.tensor(rates[0], dtype=dtype)
    with on(emulator()[0]):
        plain = build({"name": name})
        optimizer = build_optimizer(
            name,
            [{"params": [p.detach().clone().requires_grad_() for p in held(plain)], "lr": lr}],
            capturable=capturable,
        )
        for step, rate in enumerate(rates):
            lr.fill_(rate)
            plain.param_groups[0]["lr"] = float(lr)
            train((optimizer, plain), range(step, step + 1))
            assert optimizer.param_groups[0]["lr"] is lr
            assert_nearly_same(optimizer, plain)


def groups_of(params: list[Tensor]) -> list[dict[str, Any]]:
    settings = [
        {"lr": 0.1},
        {"lr": 0.001, "weight_decay": 0.2},
        {"betas": (0.5, 0.7), "eps": 1e-3, "bias_correction": False},
    ]
    return [{"params": [p], **own} for p, own in zip(params, settings, strict=True)]


@pytest.mark.parametrize("capturable", [True, False])
@pytest.mark.parametrize("name", ["adamw32bit", "lamb32bit", "lamb8bit"])
def test_groups_of_one_bucket_keep_their_hyperparameters(name: str, capturable: bool) -> None:
    shapes: list[Shape] = [(70, 64), (33, 300), (20, 256)]
    params = [values(shape, torch.float32, i).requires_grad_() for i, shape in enumerate(shapes)]
    backend, driver = emulator()
    with on(backend):
        groups = groups_of([p.detach().clone().requires_grad_() for p in params])
        together = build_optimizer(name, groups, capturable=capturable)
        apart = [
            build_optimizer(name, [group], capturable=capturable) for group in groups_of(params)
        ]
        for step in range(3):
            give_gradients(together, step)
            for p, q in zip(params, held(together), strict=True):
                p.grad = q.grad
            driver.launches.clear()
            together.step()
            assert [kernel for kernel, _ in driver.launches].count("optfactory_update") == 1
            for optimizer in apart:
                optimizer.step()
    for p, q in zip(params, held(together), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("capturable", [True, False])
@pytest.mark.parametrize("name", ["adamw32bit", "lamb8bit"])
def test_more_groups_than_one_launch_can_write(name: str, capturable: bool) -> None:
    """600 tensors in 200 groups: several writes of each column, and of the scalars."""

    def build_groups() -> list[dict[str, Any]]:
        params = [values((64 + i % 7,), torch.float32, i).requires_grad_() for i in range(600)]
        return [{"params": params[3 * i : 3 * i + 3], "lr": 0.1 / (i + 1)} for i in range(200)]

    with on(emulator()[0]):
        asked = {"min_8bit_size": 1, "capturable": capturable}
        optimizer = build_optimizer(name, build_groups(), **asked)
        train((optimizer,), range(2))
    with on(ReferenceBackend()):
        plain = build_optimizer(name, build_groups(), min_8bit_size=1)
        train((plain,), range(2))
    for p, q in zip(held(optimizer), held(plain), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert all(state["step"] == 2 for state in optimizer.state.values())


@pytest.mark.parametrize("label", OPTIONS)
def test_checkpoints_go_from_device_steps_to_host_steps_and_back(label: str) -> None:
    with on(emulator()[0]):
        device, host = pair(OPTIONS[label])
        train((device, host), range(2))
        saved = copy.deepcopy(device.state_dict()), copy.deepcopy(host.state_dict())
        to_host, to_device = build(OPTIONS[label]), build(OPTIONS[label], capturable=True)
        for target, source, state in ((to_host, device, saved[0]), (to_device, host, saved[1])):
            target.load_state_dict(state)
            with torch.no_grad():
                for p, q in zip(held(target), held(source), strict=True):
                    p.copy_(q)
        assert not to_host.param_groups[0]["capturable"]
        assert to_device.param_groups[0]["capturable"]
        train((device, host, to_host, to_device), range(2, 4))
    assert_nearly_same(to_host, device)
    assert_nearly_same(to_device, host)
    assert all(state["step"] == 4 for state in to_device.state.values())
