"""Tools of the unit tests: refused configs, and parameters trained on made-up gradients."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from optfactory import Optimizer2State, build_optimizer, resolve
from optfactory.build.compiler import find_compiler
from optfactory.errors import ConfigError
from tests.conftest import has_compiler
from tests.devices import randn
from tests.families import NAMES as NAMES

BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048, 4096)
NUMBERS = ("lr", "eps", "weight_decay")

# A source for compilers, and what it says when it is loaded.
SOURCE = 'extern "C" int answer() { return 42; }\n'

needs_compiler = pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")


def refusal(cfg: Any, **overrides: Any) -> ConfigError:
    """The error with which a configuration is refused."""
    with pytest.raises(ConfigError) as caught:
        resolve(cfg, **overrides)
    return caught.value


def refused(params: Any, name: str = "adam", **overrides: Any) -> str:
    """The message with which parameters are refused."""
    with pytest.raises(ConfigError) as caught:
        build_optimizer(name, params, **overrides)
    return str(caught.value)


def trainable(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return randn(shape, generator).to(dtype).requires_grad_()


def give_gradients(params: list[Tensor], seed: int = 0) -> None:
    for index, p in enumerate(params):
        generator = torch.Generator().manual_seed(1000 * seed + index)
        p.grad = randn(p.shape, generator).to(p.dtype)


def trained(optimizer: Optimizer2State, steps: int = 3) -> list[Tensor]:
    """Copies of all parameters after steps with gradients that only depend on their order."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(steps):
        give_gradients(params, step)
        optimizer.step()
    return [p.detach().clone() for p in params]


def step() -> None:
    """One step of a fresh optimizer, with the result it must have."""
    p = torch.ones(300).requires_grad_()
    optimizer = build_optimizer("adam", [p], lr=0.5)
    p.grad = torch.ones(300)
    optimizer.step()
    assert torch.allclose(p, torch.tensor(0.5))


def answer(library: Path) -> int:
    return int(ctypes.CDLL(str(library)).answer())


def without(flag: str, folder: Path) -> str:
    """A command for CXX: a compiler that refuses a flag and nothing else."""
    script = folder / f"c++{flag}"
    refuse = f'for word; do if [ "$word" = {flag} ]; then echo "no {flag}" >&2; exit 1; fi; done'
    real = " ".join(find_compiler() or ["c++"])
    script.write_text(f'#!/bin/sh\n{refuse}\nexec {real} "$@"\n')
    script.chmod(0o700)
    return str(script)


def programs(folder: Path, *names: str) -> str:
    """A folder with programs of these names, for PATH."""
    folder.mkdir()
    for name in names:
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o700)
    return str(folder)
