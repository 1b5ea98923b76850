"""Step times of sharded parameters beside plain ones of the same bytes, in each process.

torchrun --nproc-per-node 2 -m optfactory.bench.sharded adamw8bit lamb8bit
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from optfactory import build_optimizer
from optfactory.bench.cases import CASES
from optfactory.sharding.dtensors import local_tensor

_COLUMNS = ("optimizer", "sharded", "plain", "sharded / plain", "torch AdamW foreach, sharded")


def main() -> None:
    """Measure and print a table: milliseconds, medians of steps in turns, the slowest process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=["adamw8bit"])
    parser.add_argument("--case", choices=sorted(CASES), default="gpt2")
    parser.add_argument("--steps", type=int, default=15)
    asked = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if device == "cuda":
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    torch.set_num_threads(1)
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    sharded = [_sharded(shape, mesh) for shape in CASES[asked.case].shapes]
    plain = [_plain(p) for p in sharded]
    lines = [measure(name, sharded, plain, asked.steps) for name in asked.names]
    if dist.get_rank() == 0:
        print(f"{CASES[asked.case].text}, {mesh.size()} processes, medians of {asked.steps}, ms")
        for line in (_COLUMNS, *lines):
            print("| " + " | ".join(line) + " |")
    dist.barrier()
    dist.destroy_process_group()


def measure(
    name: str, sharded: Sequence[Tensor], plain: Sequence[Tensor], steps: int
) -> tuple[str, ...]:
    """One row: medians over the steps, of the process that is slowest."""
    calls = [
        build_optimizer(name, sharded).step,
        build_optimizer(name, plain).step,
        torch.optim.AdamW(sharded, foreach=True).step,
    ]
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(steps + 2):
        for call, own in zip(calls, times, strict=True):
            seconds = _timed(call)
            if turn > 1:  # the first ones compile kernels and make state
                own.append(seconds)
    ratio = statistics.median(a / b for a, b in zip(times[0], times[1], strict=True))
    device = local_tensor(sharded[0]).device
    worst = torch.tensor(
        [*map(statistics.median, times), ratio], dtype=torch.float64, device=device
    )
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    *milliseconds, ratio = worst.tolist()
    ours, alone, theirs = (f"{1e3 * value:.1f}" for value in milliseconds)
    return (name, ours, alone, f"{ratio:.3f}", theirs)


def _timed(call: Callable[[], Any]) -> float:
    dist.barrier()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def _sharded(shape: tuple[int, ...], mesh: Any) -> nn.Parameter:
    rows = len(range(shape[0])[slice(*_share(shape[0], mesh))])
    local = torch.empty(rows, *shape[1:], dtype=torch.float32, device=mesh.device_type)
    stride = torch.empty(shape, dtype=torch.float32, device="meta").stride()

    def wrapped(std: float) -> Tensor:
        values = local.clone().normal_(std=std)
        return DTensor.from_local(values, mesh, [Shard(0)], shape=torch.Size(shape), stride=stride)

    parameter = nn.Parameter(wrapped(0.02))
    parameter.grad = wrapped(0.01)
    return parameter


def _share(rows: int, mesh: Any) -> tuple[int, int]:
    each = -(-rows // mesh.size())
    return mesh.get_local_rank() * each, (mesh.get_local_rank() + 1) * each


def _plain(parameter: Tensor) -> nn.Parameter:
    plain = nn.Parameter(local_tensor(parameter).detach().clone())
    assert parameter.grad is not None
    plain.grad = local_tensor(parameter.grad).clone()
    return plain


if __name__ == "__main__":
    main()
