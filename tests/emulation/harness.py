"""Tools of the tests of the CUDA backend: variants, guarded parameters, comparisons."""

from __future__ import annotations

import contextlib
import itertools
import platform
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from optfactory import Optimizer2State, get_optimizer_info, list_optimizers, resolve
from optfactory.backends import Backend
from optfactory.backends.cpu.backend import CpuBackend
from optfactory.backends.cuda.backend import CudaBackend
from optfactory.config.schema import OptimizerConfig
from optfactory.errors import ConfigError
from tests.emulation.driver import EmulatedDriver
from tests.emulation.guarded import Guarded
from tests.numerics.harness import DTYPES, gradient
from tests.reference.tracked import spacing

Shape = tuple[int, ...]

# Parameter and gradient dtypes; a gradient may be float32 whatever its parameter is.
PAIRS = {name: (dtype, dtype) for name, dtype in DTYPES.items()} | {
    f"{name}-fp32": (DTYPES[name], torch.float32) for name in ("fp16", "bf16")
}


def _has_fma() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    known = cpuinfo.is_file() and " fma " in cpuinfo.read_text(encoding="utf-8", errors="replace")
    return known or platform.machine() in ("aarch64", "arm64")


needs_fma = pytest.mark.skipif(
    not _has_fma(), reason="the native backend rounds twice where this processor has no fma"
)


# ---- variants of kernels ---------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One optimizer per rule and width; all that its family's schema can select."""

    family: str
    asked: dict[str, Any]

    @property
    def width(self) -> int:
        return int(self.asked["optim_bits"])

    @property
    def is_elementwise(self) -> bool:
        """Whether no norm takes part, so that every backend must give the same bits."""
        config = resolve(self.family, **self.asked)
        return config.rule(config.model_dump()).trust_ratio is None


def _choices(model: type[OptimizerConfig]) -> dict[str, list[Any]]:
    """The fields with few values, which may select another rule; defaults come first."""
    found: dict[str, list[Any]] = {"optim_bits": [32, 8]}
    if "trust_ratio" in model.model_fields:  # whose norms may be of something else
        found["compat"] = ["none", "bitsandbytes"]
    for key, item in model.model_fields.items():
        if key in OptimizerConfig.model_fields:
            continue
        values = [False, True] if item.annotation is bool else []
        if typing.get_origin(item.annotation) is Literal:
            values = list(typing.get_args(item.annotation))
        if values:
            found[key] = sorted(values, key=lambda value, first=item.default: value != first)
    return found


def _cases() -> dict[str, Case]:
    cases: dict[str, Case] = {}
    for info in map(get_optimizer_info, list_optimizers()):
        if info.name != info.family:
            continue
        choices = _choices(info.config_class)
        for values in itertools.product(*choices.values()):
            asked = dict(zip(choices, values, strict=True))
            try:
                rule = info.config_class.rule(resolve(info.name, **asked).model_dump())
            except ConfigError:
                continue
            label = f"{info.family}-{rule.name}-{rule.trust_ratio}-{asked['optim_bits']}"
            cases.setdefault(label, Case(info.family, asked))
    return cases


CASES = _cases()


# ---- backends --------------------------------------------------------------------------------


def emulator(seed: int = 0, blocks: int = 3) -> tuple[CudaBackend, EmulatedDriver]:
    """A CUDA backend without CUDA, and its driver."""
    driver = EmulatedDriver(seed, blocks)
    return CudaBackend(driver), driver


NATIVE = CpuBackend()


@contextlib.contextmanager
def on(backend: Backend) -> Iterator[None]:
    """Optimizers are built and stepped on this backend; each must stay on one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("optfactory.backends.backend_for", lambda device: backend)
        yield


# ---- parameters ------------------------------------------------------------------------------


def values(shape: Shape, dtype: torch.dtype, seed: int) -> Tensor:
    """About 0.1 N(0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    return (0.1 * torch.randn(shape, generator=generator)).to(dtype)


def set_gradient(p: Tensor, grad: Tensor) -> None:
    """Give a gradient of any dtype, where this torch allows it."""
    try:
        if hasattr(p, "grad_dtype"):
            p.grad_dtype = grad.dtype
        p.grad = grad
    except RuntimeError as refusal:
        pytest.skip(f"this torch refuses: {refusal}")


def guard_states(optimizer: Optimizer2State, guarded: Guarded, offsets: Sequence[int]) -> None:
    """Put guards around all state tensors; of parameter i they begin at offsets[i]."""
    optimizer.init_states()
    for (p, state), offset in zip(list(optimizer.state.items()), offsets, strict=True):
        optimizer.state[p] = {
            key: guarded.copy(key, tensor, 0 if key == "step" else offset)
            for key, tensor in state.items()
        }


def held(optimizer: Optimizer2State) -> list[Tensor]:
    """All parameters of an optimizer in order."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def give_gradients(optimizer: Optimizer2State, seed: int) -> None:
    """Gradients that depend on the seed and on a parameter's place and shape alone."""
    for index, p in enumerate(held(optimizer)):
        p.grad = gradient(tuple(p.shape), p.dtype, 1000 * seed + index)


# ---- comparisons -----------------------------------------------------------------------------


def is_same(one: Tensor, other: Tensor) -> bool:
    """Equal bit by bit; only NaN may differ in payload, which no standard orders."""
    one, other = one.detach().contiguous(), other.detach().contiguous()
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    different = one.view(-1).view(torch.uint8) != other.view(-1).view(torch.uint8)
    if not different.any() or not one.is_floating_point():
        return not different.any()
    both_nan = (one.isnan() & other.isnan()).view(-1, 1)
    return not (different.view(-1, one.element_size()) & ~both_nan).any()


def assert_same_states(one: Optimizer2State, other: Optimizer2State) -> None:
    """All state tensors of two optimizers of the same parameters are equal."""
    for index, (p, q) in enumerate(zip(held(one), held(other), strict=True)):
        mine, theirs = one.state[p], other.state[q]
        assert list(mine) == list(theirs)
        for key, tensor in mine.items():
            what = f"'{key}' of parameter {index}, {tuple(p.shape)}"
            assert is_same(tensor, theirs[key]), f"{what}, differs"


def assert_same(one: Optimizer2State, other: Optimizer2State) -> None:
    """Parameters and states of two optimizers are equal."""
    for index, (p, q) in enumerate(zip(held(one), held(other), strict=True)):
        assert is_same(p, q), f"parameter {index}, {tuple(p.shape)}, differs"
    assert_same_states(one, other)


def assert_close_steps(p: Tensor, q: Tensor, before: Tensor) -> None:
    """Equal but for trust ratios of two norms that may each be rounded to the other neighbour."""
    new, other, old = (x.detach().double().numpy() for x in (p, q, before))
    finite = np.isfinite(other)
    assert (finite == np.isfinite(new)).all(), f"parameter of {tuple(p.shape)} is not finite"
    new, other, old = new[finite], other[finite], old[finite]
    tolerance = 2.0**-21 * np.abs(other - old) + spacing(other, p.dtype)
    worst = (np.abs(new - other) / tolerance).max(initial=0.0)
    assert worst <= 1, f"parameter of {tuple(p.shape)} is off by {worst:.3g} x the tolerance"


def copy_training(source: Optimizer2State, target: Optimizer2State) -> None:
    """Let another optimizer go on from the same parameters and states."""
    with torch.no_grad():
        for p, q in zip(held(source), held(target), strict=True):
            q.copy_(p)
            for key, tensor in source.state[p].items():
                target.state[q][key].copy_(tensor)
