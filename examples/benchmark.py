"""Time optimizer steps against torch's fused AdamW and against the memory's bandwidth.

    python examples/benchmark.py                                  # everything, several minutes
    python examples/benchmark.py --names adamw8bit lamb8bit --cases large --parts time
    python examples/benchmark.py --peers --dtype bfloat16 --json figures.json
    python examples/benchmark.py --device cuda --json figures.json    # on a GPU, 5 to 8 minutes

Every candidate is alternated with torch.optim.AdamW(fused=True) on the same tensors, step by step,
so that both meet the same machine. ms, ns and `x fused` are medians, the last of paired ratios;
`best` is the ratio of the two fastest steps, which other load on the machine disturbs least.
`x limit` is the time as a multiple of the least memory traffic of such a step (LAMB reads its
input twice) over the bandwidth measured first. On a GPU ms is the device's time, `host ms` the
time until a step returns, and the bytes that the limit counts are in the table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from bench import cases
from bench.device import DEVICES, Device
from bench.isolated import peak_memory, startup
from torch import Tensor
from torch.optim import Optimizer

BUSY = 1.3  # median over fastest baseline step beyond which other load spoils the medians
Row = dict[str, Any]


def time_pairs(
    device: Device, baseline: Optimizer, candidate: Optimizer, seconds: float, least: int
) -> list[tuple[float, float]]:
    """Seconds of (baseline step, candidate step), alternated until the time is used up."""
    deadline = time.monotonic() + seconds
    pairs: list[tuple[float, float]] = []
    while len(pairs) < least or (time.monotonic() < deadline and len(pairs) < 300):
        pairs.append((device.time(baseline.step), device.time(candidate.step)))
    return pairs


def time_case(
    case: str,
    names: list[str],
    device: Device,
    bandwidth: float,
    args: argparse.Namespace,
    dtype: str,
) -> Iterator[Row]:
    """One row for each name; at most the baseline and one candidate are alive at a time."""
    shapes = cases.fitting(case, dtype, device.room())
    parameters = cases.make_parameters(shapes, dtype, device.name)
    baseline = cases.make_optimizer(cases.BASELINE, parameters)
    for name in names:
        try:
            yield time_candidate(name, case, parameters, baseline, device, bandwidth, args)
        except Exception as error:  # a peer's failure must not end the run
            if name not in cases.PEERS and not isinstance(error, torch.OutOfMemoryError):
                raise
            print(f"{name}: no figures, {type(error).__name__}: {str(error).splitlines()[:1]}")
        device.release()


def time_candidate(
    name: str,
    case: str,
    parameters: list[Tensor],
    baseline: Optimizer,
    device: Device,
    bandwidth: float,
    args: argparse.Namespace,
) -> Row:
    """The figures of one optimizer, its steps alternated with the baseline's."""
    elements = cases.count(parameters)
    candidate = cases.make_optimizer(name, parameters)
    for optimizer in (baseline, candidate):
        for _ in range(2):  # the first step makes the states, and perhaps compiles
            optimizer.step()
    more = device.get_ready(baseline.step, candidate.step)
    pairs = time_pairs(device, baseline, candidate, args.seconds, args.repeats)
    fused, own = zip(*pairs, strict=True)
    median = statistics.median(own)
    states = cases.state_bytes(candidate)
    least = cases.least_bytes(name, parameters, states)
    return {
        "case": case,
        "name": name,
        "ms": 1e3 * median,
        "ns_per_param": 1e9 * median / elements,
        "times_limit": median / (least / bandwidth),
        "times_fused": statistics.median(b / a for a, b in pairs),
        "best_times_fused": min(own) / min(fused),
        "fused_ms": 1e3 * statistics.median(fused),
        "best_ms": 1e3 * min(own),
        "best_fused_ms": 1e3 * min(fused),
        "state_bytes_per_param": states / elements,
        "bytes_per_param": least / elements,
        "elements": elements,
        "pairs": len(pairs),
        **more,
    }


def print_table(title: str, columns: dict[str, str], rows: Iterator[Row], wide: int) -> list[Row]:
    """Print the rows as they come, under `columns` (key: heading); returns them.

    Args:
        wide: the width of the column `name`.
    """

    def line(cells: Row) -> str:
        return "".join(f"{cells[key]:>{wide if key == 'name' else 14}}" for key in columns)

    print(f"\n{title}\n{line(columns)}")
    kept = []
    for row in rows:
        cells = {key: f"{x:.3f}" if isinstance(x, float) else x for key, x in row.items()}
        print(line(cells), flush=True)
        kept.append(row)
    return kept


def width_of(names: list[str]) -> int:
    """Characters for a column of names."""
    return max(18, *(len(name) + 2 for name in names))


def run_times(
    names: list[str], device: Device, bandwidth: float, args: argparse.Namespace
) -> Iterator[list[Row]]:
    """Step times of every case and dtype, one table after the other."""
    columns = {
        "name": "optimizer",
        "ms": "ms/step",
        "ns_per_param": "ns/param",
        "times_limit": "x limit",
        "times_fused": "x fused",
        "best_times_fused": "best",
        "state_bytes_per_param": "state B/param",
    } | device.columns
    for case, dtype in itertools.product(args.cases, args.dtype):
        text, shapes = cases.CASES[case]
        count = len(cases.fitting(case, dtype, device.room()))
        if count < len(shapes):
            text += f", of which the first {count} of {len(shapes)} tensors fit"
        title = f"{case}: {text}, {dtype}"
        if count == 0:
            print(f"\n{title}: left out")
            continue
        chosen = [name for name in names if name in args.asked or cases.is_for(name, case)]
        found = time_case(case, chosen, device, bandwidth, args, dtype)
        table = print_table(title, columns, found, width_of(chosen))
        spread = max((row["fused_ms"] / row["best_fused_ms"] for row in table), default=0.0)
        if spread > BUSY:
            print(f"torch fused varied {spread:.1f}-fold: a busy machine; trust only `best`")
        yield [row | {"dtype": dtype} for row in table]
        device.release()


def run_memory(names: list[str], args: argparse.Namespace) -> list[Row]:
    """Peak memory of every case, in MiB."""
    columns = {"case": "case", "name": "optimizer", "extra": "extra", "transient": "in one step"}
    rows = (
        {"case": case, "name": name} | {key: value / 2**20 for key, value in measured.items()}
        for case in args.cases
        for name in names
        for measured in [peak_memory(name, case, args.dtype[0], torch.get_num_threads())]
    )
    title = "peak memory beyond parameters, gradients and states, MiB (exact to about 0.2)"
    return print_table(title, columns, rows, width_of(names))


def run_startup(names: list[str], device: Device) -> list[Row]:
    """Cost of the first step with a cold and with a warm cache of compiled kernels, in seconds."""
    keys = ("import", "build", "first", "later", "overhead")
    columns = {"name": "optimizer", "cache": "cache"} | {key: key for key in keys}
    rows = (
        {"name": name, "cache": cache} | figures
        for name in names
        for cache, figures in startup(name, torch.get_num_threads(), device.name).items()
    )
    title = "start, s (overhead = build + first step - later step)"
    return print_table(title, columns, rows, width_of(names))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=DEVICES, default="cpu")
    add("--names", nargs="+", metavar="NAME", help="optimizers of optfactory")
    add("--cases", nargs="+", choices=cases.CASES)
    add("--dtype", nargs="+", choices=cases.DTYPES, help="of parameters and gradients")
    add("--parts", nargs="+", choices=["time", "memory", "startup"], help="default: all")
    add("--peers", action=argparse.BooleanOptionalAction, help="other libraries too")
    add("--threads", type=int, help="default: torch's own choice")
    add("--seconds", type=float, help="time for each candidate and case")
    add("--repeats", type=int, help="least number of pairs")
    add("--json", type=Path, metavar="FILE", help="write all figures")
    add("--quick", action="store_true", help="tiny sizes to try the script; figures mean nothing")
    args = parser.parse_args(arguments)
    device = DEVICES[args.device]
    args.startup_names = args.names or list(device.startup_names)
    # What is measured in every case, whether or not that takes long.
    args.asked = [*(args.names or []), *(device.peers if args.device == "cpu" else [])]
    for key in ("names", "cases", "dtype", "parts", "seconds", "repeats"):
        if getattr(args, key) is None:
            setattr(args, key, getattr(device, {"dtype": "dtypes"}.get(key, key)))
    args.peers = device.with_peers if args.peers is None else args.peers
    if args.quick:
        args.cases, args.seconds, args.repeats = ["tiny"], 0.0, 2
    return args


def candidates(args: argparse.Namespace) -> list[str]:
    """Everything to be timed, in order; of the peers of a GPU those that are installed."""
    device = DEVICES[args.device]
    peers = [name for name in device.peers if args.device == "cpu" or cases.is_installed(name)]
    return [*device.torch_names, *args.names, *(peers if args.peers else [])]


def main() -> None:
    args = parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = DEVICES[args.device]()
    facts = device.describe()
    bandwidth = device.bandwidth(args.quick)
    result: dict[str, Any] = {**facts, "dtype": " ".join(args.dtype), "bandwidth": bandwidth}
    print(*(f"{key}: {value}" for key, value in facts.items()), sep="\n")
    print(f"bandwidth: {bandwidth / 1e9:.1f} GB/s ({device.probe})")

    def save() -> None:  # after each table: a run may be cut short
        if args.json:
            args.json.write_text(json.dumps(result, indent=2) + "\n")

    if "time" in args.parts:
        result["time"] = []
        for rows in run_times(candidates(args), device, bandwidth, args):
            result["time"] += rows
            save()
    if "memory" in args.parts:
        if sys.platform == "linux" and device.name == "cpu":
            result["memory"] = run_memory([cases.BASELINE, *args.names], args)
        else:
            print("\npeak memory of the process is measured on CPUs, and on Linux only")
    if "startup" in args.parts:
        result["startup"] = run_startup(args.startup_names, device)
    save()


if __name__ == "__main__":
    main()
