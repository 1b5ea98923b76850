"""On a GPU too, what cannot work is named before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optfactory import Optimizer2State, build_optimizer
from optfactory.backends.cuda import backend as cuda
from optfactory.backends.cuda.backend import CudaBackend
from optfactory.backends.cuda.cupy_driver import CupyDriver, CupyModule
from optfactory.errors import ConfigError, KernelCompileError, StateError
from optfactory.memory.cupy import load_cupy
from tests.gpu.harness import DEVICE, content, give, gradients, needs_gpu, parameters, train

pytestmark = needs_gpu

SHAPES = [(70, 80), (300,)]


def started() -> tuple[Tensor, Tensor, Optimizer2State]:
    """Two parameters after a step: `other` comes first and is fine all the time."""
    other, p = parameters(DEVICE, SHAPES[::-1])
    optimizer = build_optimizer("adam8bit", [("other", other), ("body.weight", p)])
    train(optimizer, [other, p], range(1))
    give([other, p], gradients([other, p], 1))
    return p, other, optimizer


def refused(optimizer: Optimizer2State, error: Any, match: str) -> None:
    """A step is refused before any kernel runs: one with a wrong pointer would end the process."""

    def launched(*arguments: Any) -> None:
        raise AssertionError(f"launched {arguments[1]}")

    before = content(optimizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CupyModule, "launch", launched)
        with pytest.raises(error, match=match):
            optimizer.step()
    assert content(optimizer) == before


def test_a_parameter_cast_to_float64() -> None:
    p, _, optimizer = started()
    p.grad = None
    p.data = p.detach().double()
    p.grad = torch.ones_like(p)
    refused(optimizer, ConfigError, r"body\.weight.*float64")


def test_a_parameter_of_another_size() -> None:
    p, _, optimizer = started()
    p.grad = None
    p.data = torch.cat([p.detach(), p.detach()])
    p.grad = torch.ones_like(p)
    refused(optimizer, ConfigError, r"body\.weight.*shape")


def test_a_parameter_moved_to_the_cpu() -> None:
    p, other, optimizer = started()
    p.grad = None
    torch.utils.swap_tensors(p, torch.ones(SHAPES[0]).requires_grad_())
    p.grad = torch.ones(SHAPES[0])
    before = other.detach().clone()
    with pytest.raises(ConfigError, match=r"body\.weight.*on cpu.*state on cuda:0"):
        optimizer.step()
    assert torch.equal(other, before)
    assert optimizer.state[other]["step"] == 1


def test_a_sparse_gradient() -> None:
    embedding = nn.Embedding(10, 4, sparse=True).to(DEVICE)
    optimizer = build_optimizer("adam", embedding)
    embedding(torch.tensor([1, 2], device=DEVICE)).sum().backward()
    optimizer.init_states()
    refused(optimizer, ConfigError, r"weight.*sparse=False")


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (lambda t: t[:3].clone(), "shape"),
        (lambda t: t.float(), "uint8"),
        (lambda t: t.t().contiguous().t(), "contiguous"),
        (lambda t: t.cpu(), "cpu"),
    ],
)
def test_a_state_tensor_that_does_not_fit(wrong: Any, match: str) -> None:
    p, _, optimizer = started()
    optimizer.state[p]["exp_avg_q8"] = wrong(optimizer.state[p]["exp_avg_q8"])
    refused(optimizer, (StateError, ConfigError), rf"body\.weight.*{match}")


def test_a_scale_tensor_on_another_device() -> None:
    p, _, optimizer = started()
    optimizer.state[p]["exp_avg_absmax"] = optimizer.state[p]["exp_avg_absmax"].cpu()
    refused(optimizer, (StateError, ConfigError), r"body\.weight.*cpu")


def test_a_kernel_that_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bucket before it is not updated either."""
    fine, bad = parameters(DEVICE, SHAPES)
    optimizer = build_optimizer(
        "adam", [{"params": [fine]}, {"params": [bad], "amsgrad": True, "lr": 0.5}]
    )
    optimizer.init_states()
    give([fine, bad], gradients([fine, bad], 0))

    def broken(variant: Any) -> str:
        return "syntax error" if "amsgrad" in variant.rule.name else source(variant)

    source = cuda.cuda_source
    backend = CudaBackend(CupyDriver(load_cupy()))
    with monkeypatch.context() as patch:
        patch.setattr(cuda, "cuda_source", broken)
        patch.setattr("optfactory.backends.backend_for", lambda device: backend)
        refused(optimizer, KernelCompileError, "NVRTC could not compile")
    optimizer.step()
    assert all(optimizer.state[p]["step"] == 1 for p in (fine, bad))


def test_a_damaged_kernel_in_the_cache_is_compiled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results: list[list[bytes]] = []
    clean: dict[str, bytes] = {}
    # CuPy remembers what it loaded from a path, hence a folder for each damage.
    for folder, damage in (("clean", None), ("text", b"no machine code"), ("empty", b"")):
        cache = tmp_path / folder
        cache.mkdir(mode=0o700)
        monkeypatch.setenv("OPTFACTORY_CACHE", str(cache))
        for name in clean:
            (cache / name).write_bytes(damage or b"")
        backend = CudaBackend(CupyDriver(load_cupy()))
        monkeypatch.setattr("optfactory.backends.backend_for", lambda device, b=backend: b)
        params = parameters(DEVICE, SHAPES)
        optimizer = build_optimizer("adam8bit", params)
        train(optimizer, params, range(2))
        results.append(content(optimizer))
        found = {file.name: file.read_bytes() for file in cache.glob("*.cubin")}
        clean = clean or found
        assert found == clean
    assert clean
    assert results[0] == results[1] == results[2]


# ---- configs ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "name", "options", "match"),
    [
        (DEVICE, "paged_adam", {"page_dir": "/tmp"}, "page_dir: is for CPU parameters"),
        ("cpu", "paged_adam", {"page_memory": "pinned"}, "page_memory: is for CUDA parameters"),
        ("cpu", "adam", {"capturable": True}, "capturable: needs parameters on a CUDA device"),
        (DEVICE, "paged_adam", {"capturable": True}, "capturable"),
        (DEVICE, "adam", {"page_memory": "managed"}, "page_memory"),
    ],
)
def test_options_of_another_device(
    device: torch.device | str, name: str, options: dict[str, Any], match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        build_optimizer(name, parameters(device), **options)


def test_capturable_needs_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPTFACTORY_BACKEND", "reference")
    with pytest.raises(ConfigError, match="capturable"):
        build_optimizer("adam", parameters(DEVICE), capturable=True)


def test_the_portable_backend_runs_on_a_gpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    params, others = parameters(DEVICE), parameters(DEVICE)
    for side in (params, others):
        train(build_optimizer("adamw", side, lr=0.01), side, range(3))
        monkeypatch.setenv("OPTFACTORY_BACKEND", "reference")
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)
