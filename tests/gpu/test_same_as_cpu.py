"""The GPU computes what the CPU does: bit for bit where no sum over a tensor is involved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optfactory import Optimizer2State, build_optimizer
from tests.conftest import has_compiler
from tests.gpu.harness import DEVICE, content, give, needs_gpu, numbers, parameters, trained
from tests.numerics.harness import DTYPES, gradient
from tests.numerics.harness import SHAPES as USUAL

pytestmark = [
    *needs_gpu,
    pytest.mark.skipif(not has_compiler(), reason="no C++ compiler for the native backend"),
]

SHAPES = [*USUAL, (1000, 333), (5, 4097), (3, 3, 129, 31), (20_001,)]
RULES = ["adam32bit", "adam8bit", "adamw32bit", "adamw8bit"]
STEPS = 4

dtypes = pytest.mark.parametrize("dtype", DTYPES)


def assert_identical(gpu: Tensor, cpu: Tensor, what: str) -> None:
    """The same bytes, but NaN may be any NaN."""
    gpu = gpu.detach().cpu()
    assert gpu.dtype == cpu.dtype
    assert gpu.shape == cpu.shape, what
    torch.testing.assert_close(gpu, cpu.detach(), rtol=0, atol=0, equal_nan=True, msg=what)
    if cpu.is_floating_point():  # zeros have signs
        assert torch.equal(gpu.signbit() | gpu.isnan(), cpu.signbit() | cpu.isnan()), what


def assert_same(gpu: Optimizer2State, cpu: Optimizer2State) -> None:
    sides = [[p for group in o.param_groups for p in group["params"]] for o in (gpu, cpu)]
    for p, q in zip(*sides, strict=True):
        what = f"{tuple(p.shape)} {p.dtype}"
        assert list(gpu.state[p]) == list(cpu.state[q])
        assert_identical(p, q, what)
        for key, value in gpu.state[p].items():
            assert_identical(value, cpu.state[q][key], f"{what} {key}")


def run(
    name: str, values: list[Tensor], grads: list[list[Tensor]], **options: Any
) -> tuple[Optimizer2State, Optimizer2State]:
    """Trains on both devices: on the GPU first."""
    optimizers = []
    for device in (DEVICE, torch.device("cpu")):
        params = [value.detach().clone().to(device).requires_grad_() for value in values]
        optimizer = build_optimizer(name, params, **options)
        for step in grads:
            give(params, [grad.to(device) for grad in step])
            optimizer.step()
        optimizers.append(optimizer)
    return optimizers[0], optimizers[1]


def usual_grads(values: list[Tensor], steps: int = STEPS) -> list[list[Tensor]]:
    return [
        [gradient(tuple(v.shape), v.dtype, 100 * step + i) for i, v in enumerate(values)]
        for step in range(steps)
    ]


@dtypes
@pytest.mark.parametrize("name", RULES)
def test_elementwise_rules_are_those_of_the_cpu_to_the_bit(name: str, dtype: str) -> None:
    values = [numbers(shape, DTYPES[dtype], i) for i, shape in enumerate(SHAPES)]
    assert_same(*run(name, values, usual_grads(values), lr=0.01, weight_decay=0.1))


@dtypes
@pytest.mark.parametrize("block_size", [64, 128, 256, 512, 1024, 2048, 4096])
def test_every_block_size(block_size: int, dtype: str) -> None:
    values = [numbers(shape, DTYPES[dtype], i) for i, shape in enumerate(SHAPES)]
    options: dict[str, Any] = {"block_size": block_size, "min_8bit_size": 1}
    assert_same(*run("adamw8bit", values, usual_grads(values), **options))


@pytest.mark.parametrize("bits", [32, 8])
@dtypes
def test_numbers_that_are_not_finite_tiny_or_huge(dtype: str, bits: int) -> None:
    odd = [torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-45, -1e-40, 1e-30, 3e38, -1e20]
    values = [numbers(shape, DTYPES[dtype], i) for i, shape in enumerate([(70, 300), (9000,)])]
    grads = usual_grads(values)
    for step in (1, 2):
        for grad in grads[step]:
            grad.view(-1)[step : 37 * len(odd) : 37] = torch.tensor(odd).to(grad.dtype)
    for value in values:
        value.view(-1)[5 : 53 * len(odd) : 53] = torch.tensor(odd).to(value.dtype)
    assert_same(*run("adam", values, grads, optim_bits=bits))


def test_amsgrad() -> None:
    values = [numbers(shape, torch.float32, i) for i, shape in enumerate(SHAPES)]
    assert_same(*run("adamw", values, usual_grads(values), amsgrad=True))


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_float32_gradients_of_16_bit_parameters(dtype: str, bits: int) -> None:
    if not hasattr(Tensor, "grad_dtype"):
        pytest.skip("this torch ties their dtypes")
    results = []
    for device in (DEVICE, torch.device("cpu")):
        params = [numbers(shape, DTYPES[dtype]).to(device) for shape in SHAPES]
        for p in params:
            p.requires_grad_().grad_dtype = None
        optimizer = build_optimizer("adam", params, optim_bits=bits)
        for step in range(STEPS):
            shapes = enumerate(SHAPES)
            grads = [gradient(s, torch.float32, 100 * step + i).to(device) for i, s in shapes]
            give(params, grads)
            optimizer.step()
        results.append(optimizer)
    assert_same(*results)


# ---- memory layouts ---------------------------------------------------------------------------

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "offset by one": lambda x: _offset(x, 1),
    "offset by four": lambda x: _offset(x, 4),
    "transposed": lambda x: x.t().contiguous().t(),
    "every other row": lambda x: x.repeat_interleave(2, dim=0)[::2],
    "columns": lambda x: torch.cat([x, x], dim=1)[:, 3 : 3 + x.shape[1]].copy_(x),
}


def _offset(x: Tensor, by: int) -> Tensor:
    view = x.new_empty(x.numel() + by)[by:].view(x.shape)
    return view.copy_(x)


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("gradient_too", [False, True])
@pytest.mark.parametrize("layout", VIEWS)
@dtypes
def test_views(dtype: str, layout: str, gradient_too: bool, bits: int) -> None:
    shape = (130, 300)
    value = numbers(shape, DTYPES[dtype])
    grads = [gradient(shape, value.dtype, step) for step in range(STEPS)]
    optimizers = []
    for device in (DEVICE, torch.device("cpu")):
        p = nn.Parameter(VIEWS[layout](value.to(device)))
        optimizer = build_optimizer("adamw", [p], optim_bits=bits)
        for grad in grads:
            p.grad = VIEWS[layout](grad.to(device)) if gradient_too else grad.to(device)
            optimizer.step()
        optimizers.append(optimizer)
    assert_same(optimizers[0], optimizers[1])


# ---- norms ------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("mode", ["lamb", "clip"])
@pytest.mark.parametrize("bits", [32, 8])
def test_lamb_is_that_of_the_cpu_within_rounding(bits: int, mode: str, dtype: str) -> None:
    """Norms are summed in another order, so the ratio may differ in its last bit."""
    values = [numbers(shape, DTYPES[dtype], i) for i, shape in enumerate(SHAPES)]
    gpu, cpu = run("lamb", values, usual_grads(values, 1), optim_bits=bits, trust_ratio=mode)
    close: dict[str, Any] = {"rtol": 2e-6, "atol": 1e-8}
    if DTYPES[dtype] != torch.float32:  # a rounding of the parameter may go the other way
        close = {"rtol": torch.finfo(DTYPES[dtype]).eps, "atol": 1e-7}
    sides = [o.param_groups[0]["params"] for o in (gpu, cpu)]
    for p, q in zip(*sides, strict=True):
        torch.testing.assert_close(p.detach().cpu(), q.detach(), **close)
        for key, value in gpu.state[p].items():  # states do not depend on the ratio
            assert_identical(value, cpu.state[q][key], key)


@pytest.mark.parametrize("name", ["lamb", "lamb8bit", "paged_lamb8bit"])
def test_two_runs_give_the_same_bits(name: str) -> None:
    shapes = [(3_000_001,), (1000, 1000), (64, 130), (5,)]
    runs = [content(trained(name, parameters(DEVICE, shapes))) for _ in range(3)]
    assert runs[0] == runs[1] == runs[2]


def test_a_norm_does_not_depend_on_what_else_is_in_the_bucket() -> None:
    alone, among = parameters(DEVICE, [(1000, 1000)]), parameters(DEVICE, [(1000, 1000)])
    grad = gradient((1000, 1000), torch.float32, 0).to(DEVICE)
    others = parameters(DEVICE, [(300,)] * 7)
    give([*alone, *among], [grad, grad.clone()])
    give(others, [torch.ones_like(p) for p in others])
    build_optimizer("lamb8bit", alone).step()
    build_optimizer("lamb8bit", [*others[:3], *among, *others[3:]]).step()
    assert torch.equal(alone[0], among[0])
