"""Time optimizer steps against torch's fused AdamW and against the memory's bandwidth.

    python examples/benchmark.py                                  # everything, several minutes
    python examples/benchmark.py --names adamw8bit lamb8bit --cases large --parts time
    python examples/benchmark.py --peers --dtype bfloat16 --json figures.json

Every candidate is alternated with torch.optim.AdamW(fused=True) on the same tensors, step by step,
so that both meet the same machine. ms, ns and `x fused` are medians, the last of paired ratios;
`best` is the ratio of the two fastest steps, which other load on the machine disturbs least.
`x limit` is the time as a multiple of the least memory traffic of such a step (LAMB reads its
input twice) over the bandwidth measured first.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from bench import cases
from bench.device import DEVICES, CpuDevice
from bench.isolated import peak_memory, startup
from torch.optim import Optimizer

NAMES = ["adamw", "adamw8bit", "adam8bit", "lamb", "lamb8bit"]
BUSY = 1.3  # median over fastest baseline step beyond which other load spoils the medians
Row = dict[str, Any]


def time_pairs(
    device: CpuDevice, baseline: Optimizer, candidate: Optimizer, seconds: float, least: int
) -> list[tuple[float, float]]:
    """Seconds of (baseline step, candidate step), alternated until the time is used up."""
    for optimizer in (baseline, candidate):
        for _ in range(2):  # the first step makes the states, and perhaps compiles
            optimizer.step()
    pairs: list[tuple[float, float]] = []
    while len(pairs) < least or (sum(map(sum, pairs)) < seconds and len(pairs) < 300):
        pairs.append((device.time(baseline.step), device.time(candidate.step)))
    return pairs


def time_case(
    case: str, names: list[str], device: CpuDevice, bandwidth: float, args: argparse.Namespace
) -> Iterator[Row]:
    """One row for each name; at most the baseline and one candidate are alive at a time."""
    parameters = cases.make_parameters(case, args.dtype, device.name)
    elements = cases.count(parameters)
    baseline = cases.make_optimizer(cases.BASELINE, parameters)
    for name in names:
        candidate = cases.make_optimizer(name, parameters)
        pairs = time_pairs(device, baseline, candidate, args.seconds, args.repeats)
        fused, own = zip(*pairs, strict=True)
        median = statistics.median(own)
        states = cases.state_bytes(candidate)
        limit = cases.least_bytes(name, parameters, states) / bandwidth
        yield {
            "case": case,
            "name": name,
            "ms": 1e3 * median,
            "ns_per_param": 1e9 * median / elements,
            "times_limit": median / limit,
            "times_fused": statistics.median(b / a for a, b in pairs),
            "best_times_fused": min(own) / min(fused),
            "fused_ms": 1e3 * statistics.median(fused),
            "best_ms": 1e3 * min(own),
            "best_fused_ms": 1e3 * min(fused),
            "state_bytes_per_param": states / elements,
            "pairs": len(pairs),
        }
        del candidate
        gc.collect()


def print_table(title: str, columns: dict[str, str], rows: Iterator[Row]) -> list[Row]:
    """Print the rows as they come, under `columns` (key: heading); returns them."""

    def line(cells: Row) -> str:
        return "".join(f"{cells[key]:>{18 if key == 'name' else 14}}" for key in columns)

    print(f"\n{title}\n{line(columns)}")
    kept = []
    for row in rows:
        cells = {key: f"{x:.3f}" if isinstance(x, float) else x for key, x in row.items()}
        print(line(cells), flush=True)
        kept.append(row)
    return kept


def run_times(
    names: list[str], device: CpuDevice, bandwidth: float, args: argparse.Namespace
) -> list[Row]:
    """Step times of every case."""
    columns = {
        "name": "optimizer",
        "ms": "ms/step",
        "ns_per_param": "ns/param",
        "times_limit": "x limit",
        "times_fused": "x fused",
        "best_times_fused": "best",
        "state_bytes_per_param": "state B/param",
    }
    rows = []
    for case in args.cases:
        title = f"{case}: {cases.CASES[case][0]}, {args.dtype}"
        table = print_table(title, columns, time_case(case, names, device, bandwidth, args))
        spread = max(row["fused_ms"] / row["best_fused_ms"] for row in table)
        if spread > BUSY:
            print(f"torch fused varied {spread:.1f}-fold: a busy machine; trust only `best`")
        rows += table
        gc.collect()
    return rows


def run_memory(names: list[str], args: argparse.Namespace) -> list[Row]:
    """Peak memory of every case, in MiB."""
    columns = {"case": "case", "name": "optimizer", "extra": "extra", "transient": "in one step"}
    rows = (
        {"case": case, "name": name} | {key: value / 2**20 for key, value in measured.items()}
        for case in args.cases
        for name in names
        for measured in [peak_memory(name, case, args.dtype, torch.get_num_threads())]
    )
    title = "peak memory beyond parameters, gradients and states, MiB (exact to about 0.2)"
    return print_table(title, columns, rows)


def run_startup(names: list[str]) -> list[Row]:
    """Cost of the first step with a cold and with a warm cache of compiled kernels, in seconds."""
    keys = ("import", "build", "first", "later", "overhead")
    columns = {"name": "optimizer", "cache": "cache"} | {key: key for key in keys}
    rows = (
        {"name": name, "cache": cache} | figures
        for name in names
        for cache, figures in startup(name, torch.get_num_threads()).items()
    )
    return print_table("start, s (overhead = build + first step - later step)", columns, rows)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=DEVICES, default="cpu")
    add("--names", nargs="+", default=NAMES, metavar="NAME", help="optimizers of optfactory")
    add("--cases", nargs="+", choices=cases.CASES, default=["large", "gpt2", "small"])
    add("--dtype", choices=cases.DTYPES, default="float32", help="of parameters and gradients")
    add("--parts", nargs="+", choices=["time", "memory", "startup"], help="default: all three")
    add("--peers", action="store_true", help="bitsandbytes too")
    add("--threads", type=int, help="default: torch's own choice")
    add("--seconds", type=float, default=8.0, help="time for each candidate and case")
    add("--repeats", type=int, default=5, help="least number of pairs")
    add("--json", type=Path, metavar="FILE", help="write all figures")
    add("--quick", action="store_true", help="tiny sizes to try the script; figures mean nothing")
    args = parser.parse_args(arguments)
    args.parts = args.parts or ["time", "memory", "startup"]
    if args.quick:
        args.cases, args.seconds, args.repeats = ["tiny"], 0.0, 2
    return args


def main() -> None:
    args = parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = DEVICES[args.device]()
    bandwidth = device.bandwidth(args.quick)
    result: dict[str, Any] = {**device.describe(), "dtype": args.dtype, "bandwidth": bandwidth}
    print(*(f"{key}: {value}" for key, value in device.describe().items()), sep="\n")
    print(f"bandwidth: {bandwidth / 1e9:.1f} GB/s (a = a*s + b, 12 bytes an element)")

    names = [*cases.TORCH, *args.names, *(cases.PEERS if args.peers else [])]
    if "time" in args.parts:
        result["time"] = run_times(names, device, bandwidth, args)
    if "memory" in args.parts:
        if sys.platform == "linux":
            result["memory"] = run_memory([cases.BASELINE, *args.names], args)
        else:
            print("\npeak memory is measured on Linux only")
    if "startup" in args.parts:
        result["startup"] = run_startup(args.names)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
