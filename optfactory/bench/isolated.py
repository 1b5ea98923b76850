"""Measurements that need a process of their own: peak memory, and the cost of the first step.

`python -m optfactory.bench.isolated FUNCTION ARGUMENT...` prints what the function returns as JSON.
"""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

from optfactory.bench.cases import CASES
from optfactory.bench.results import Memory, Startup
from optfactory.errors import OptFactoryError

# Large blocks come from the system and go back to it, so that resident memory is what is in use.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


def in_fresh_process(function: Callable[..., Any], *arguments: object, **environment: str) -> Any:
    """Result of a function of this module in a new interpreter with these variables added."""
    words = [sys.executable, "-m", __spec__.name, function.__name__, *map(str, arguments)]
    paths = os.pathsep.join(path for path in sys.path if path)  # also where ours was found
    done = subprocess.run(
        words,
        env=os.environ | {"PYTHONPATH": paths, "PYTHONSAFEPATH": "1"} | environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise OptFactoryError(f"`{' '.join(words[1:])}` failed; its error is above")
    return json.loads(done.stdout.splitlines()[-1])


def _resident(field: str) -> int:
    """A memory field of /proc/self/status (VmRSS, VmHWM) in bytes."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def _reset_peak() -> None:
    """Give free memory back and let VmHWM start again from VmRSS."""
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")


def step_memory(label: str, case: str, dtype: str, threads: str) -> tuple[int, int]:
    """Peak memory of steps beyond parameters, gradients and states, in bytes.

    The first figure counts all that appears in the first three steps after the parameters exist,
    states taken off; the second only what a later step adds for its duration. A first step on a
    tensor of 10,000 elements loads code and starts threads beforehand. Linux only.
    """
    from optfactory.bench.candidates import BASELINE, ours, state_bytes
    from optfactory.bench.measure import make_parameters

    torch.set_num_threads(int(threads))
    candidate = BASELINE if label == BASELINE.label else ours(label)
    small = torch.zeros(100, 100, dtype=torch.float32, device="cpu", requires_grad=True)
    small.grad = torch.ones_like(small)
    candidate.build([small]).step()
    parameters = make_parameters(CASES[case], dtype, "cpu")

    _reset_peak()
    before = _resident("VmRSS")
    optimizer = candidate.build(parameters)
    for _ in range(3):
        optimizer.step()
    extra = _resident("VmHWM") - before - state_bytes(optimizer)

    _reset_peak()
    before = _resident("VmRSS")
    optimizer.step()
    return extra, _resident("VmHWM") - before


def peak_memory(label: str, case: str, dtype: str, threads: int) -> Memory:
    """`step_memory` in a process of its own."""
    sizes = in_fresh_process(step_memory, label, case, dtype, threads, **MALLOC)
    extra, transient = (size / 2**20 for size in sizes)
    return Memory(case, dtype, label, extra, transient)


def first_step(label: str, device: str, threads: str) -> tuple[float, float, float, float]:
    """Seconds of import, build and first step of an optfactory name, and of a later step."""
    torch.set_num_threads(int(threads))
    parameters = [
        torch.zeros(shape, dtype=torch.float32, device=device) for shape in CASES["tiny"].shapes
    ]
    for p in parameters:
        p.requires_grad_().grad = torch.ones_like(p)
    torch.optim.SGD(parameters, lr=0.0).step()  # what torch itself loads for any optimizer
    name, _, memory = label.partition(":")

    def now() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    begin = now()
    from optfactory.factory import build_optimizer
    from optfactory.optimizer import Optimizer2State  # noqa: F401 - timed

    imported = now()
    more = {"page_memory": memory} if memory else {}
    optimizer = build_optimizer(name, parameters, master_weights="none", **more)
    built = now()
    steps = []
    for _ in range(10):
        before = now()
        optimizer.step()
        steps.append(now() - before)
    return imported - begin, built - imported, steps[0], statistics.median(steps[1:])


def startup(label: str, device: str, threads: int) -> list[Startup]:
    """`first_step` with an empty folder of compiled kernels, and again with what that left."""
    with tempfile.TemporaryDirectory() as folder:
        return [
            Startup(
                label,
                cache,
                *in_fresh_process(first_step, label, device, threads, OPTFACTORY_CACHE=folder),
            )
            for cache in ("cold", "warm")
        ]


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
