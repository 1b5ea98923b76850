"""Instructions that kernels execute for an element: `python count.py NAME...` prints them as JSON.

A child process runs one kernel call instruction by instruction (ptrace). What is not per element
cancels out between two sizes.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable

import torch

from optfactory import build_optimizer
from optfactory.rules.passes import Stage

SIZES = (1024, 2048)
TRACE_ME, SINGLE_STEP = 0, 9
UNAVAILABLE = 3  # exit code where processes may not be traced

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


def instructions(work: Callable[[], object]) -> int:
    """How many instructions a child process executes for this work."""
    child = os.fork()
    if child == 0:
        if _libc.ptrace(TRACE_ME, 0, None, None) != 0:
            os._exit(UNAVAILABLE)
        os.kill(os.getpid(), signal.SIGSTOP)
        work()
        os._exit(0)
    count = 0
    while True:
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            break
        if _libc.ptrace(SINGLE_STEP, child, None, None) != 0:
            raise OSError(ctypes.get_errno(), "cannot trace a child process")
        count += 1
    if os.WEXITSTATUS(status) == UNAVAILABLE:
        sys.exit(UNAVAILABLE)
    return count


def kernel_calls(name: str, numel: int) -> list[Callable[[], object]]:
    """The kernel calls of a step, on state of several steps."""
    torch.manual_seed(0)
    p = torch.randn(numel, requires_grad=True)
    name, _, more = name.partition(":")
    small = {"min_8bit_size": 1, **eval(f"dict({more})")}
    optimizer = build_optimizer(name, [p], **small)
    for _ in range(3):
        p.grad = torch.randn(numel)
        optimizer.step()
    (bucket,) = optimizer._current_plan()._buckets.values()
    tables = bucket.tables
    calls = [tables.library.optfactory_update]
    if Stage.NORMS in bucket.key.sums:
        calls.append(tables.library.optfactory_norms)
    if Stage.TENSORS in bucket.key.sums:
        calls.append(tables.library.optfactory_statistics)
    keep = (optimizer, p.grad)
    return [lambda call=call, keep=keep: call(tables.bucket) for call in calls]


def per_element(name: str) -> float:
    """Instructions an element, of all passes over it."""
    small, large = (sum(map(instructions, kernel_calls(name, numel))) for numel in SIZES)
    return (large - small) / (SIZES[1] - SIZES[0])


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({name: round(per_element(name), 3) for name in sys.argv[1:]}))
