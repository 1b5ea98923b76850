"""Measurements that need a process of their own: peak memory, and the cost of the first step."""

from __future__ import annotations

import ctypes
import itertools
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from .cases import CASES, make_optimizer, make_parameters, state_bytes

# Large blocks come from the system and go back to it, so that resident memory is what is in use.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


def in_fresh_process(call: Callable[..., Any], *args: Any, **environment: str) -> Any:
    """Result of call(*args) in a new interpreter with these environment variables added."""
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(call, *args).result()
    finally:
        os.environ.clear()
        os.environ.update(before)


def resident(field: str) -> int:
    """A memory field of /proc/self/status (VmRSS, VmHWM) in bytes."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def reset_peak() -> None:
    """Give free memory back and let VmHWM start again from VmRSS."""
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")


def step_memory(name: str, case: str, dtype: str, threads: int) -> dict[str, int]:
    """Peak memory of the first three steps beyond parameters, gradients and states, in bytes.

    `extra` counts all that appears after the parameters exist, states taken off; `transient` only
    what a later step adds for its duration. A first step on a tensor of 10,000 elements loads code
    and starts threads beforehand. Linux only.
    """
    torch.set_num_threads(threads)
    small = torch.zeros(100, 100, dtype=torch.float32, requires_grad=True)
    small.grad = torch.ones_like(small)
    make_optimizer(name, [small]).step()
    parameters = make_parameters(CASES[case][1], dtype, "cpu")

    reset_peak()
    before = resident("VmRSS")
    optimizer = make_optimizer(name, parameters)
    for _ in range(3):
        optimizer.step()
    states = state_bytes(optimizer)
    extra = resident("VmHWM") - before - states

    reset_peak()
    before = resident("VmRSS")
    optimizer.step()
    return {"extra": extra, "transient": resident("VmHWM") - before, "states": states}


def peak_memory(name: str, case: str, dtype: str, threads: int) -> dict[str, int]:
    """`step_memory` in a process of its own."""
    return in_fresh_process(step_memory, name, case, dtype, threads, **MALLOC)


def first_step(name: str, threads: int, device: str) -> dict[str, float]:
    """Seconds of import, build and first step of an optfactory name, and of a later step."""
    torch.set_num_threads(threads)
    parameters = make_parameters(CASES["tiny"][1], "float32", device)
    torch.optim.SGD(parameters, lr=0.0).step()  # what torch itself loads for any optimizer

    def now() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    marks = [now()]
    import optfactory  # noqa: F401 - timed

    marks.append(now())
    optimizer = make_optimizer(name, parameters)
    marks.append(now())
    for _ in range(10):
        optimizer.step()
        marks.append(now())
    imported, built, first, *later = (b - a for a, b in itertools.pairwise(marks))
    usual = statistics.median(later)
    return {
        "import": imported,
        "build": built,
        "first": first,
        "later": usual,
        "overhead": built + first - usual,
    }


def startup(name: str, threads: int, device: str) -> dict[str, dict[str, float]]:
    """`first_step` with an empty folder of compiled kernels, and again with what that left."""
    with tempfile.TemporaryDirectory() as cache:
        return {
            state: in_fresh_process(first_step, name, threads, device, OPTFACTORY_CACHE=cache)
            for state in ("cold", "warm")
        }
