"""What depends on the device: its clock, its bandwidth, its memory and its name."""

from __future__ import annotations

import gc
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from optfactory.bench import machine, traffic
from optfactory.bench.machine import MIB
from optfactory.errors import BackendError

Call = Callable[[], object]


@dataclass(frozen=True)
class CallFigures:
    """Further figures of a step; see `results.Row`."""

    host_ms: float | None = None
    extra_mib: float | None = None


class CpuDevice:
    """The host's processor and memory; calls return when the work is done."""

    name = "cpu"

    def time(self, call: Call) -> float:
        """Seconds that one call takes."""
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin

    def get_ready(self, *calls: Call) -> list[CallFigures]:
        """Prepare to time these calls, and measure what else a device has to say about each."""
        return [CallFigures() for _ in calls]

    def room(self) -> float:
        """Bytes that a case may take; some are left for what optimizers allocate in a step."""
        return 0.8 * machine.free_memory()

    def release(self) -> None:
        """Give up memory that is no longer used."""
        gc.collect()

    def bandwidth(self, quick: bool = False, repeats: int = 25) -> float:
        """Bytes a second of the fastest of `traffic.STREAMS`, and of several runs of each.

        The two float32 arrays have 256 MiB each, or more than four times the last-level cache,
        since one stream reads a single array.
        """
        elements = MIB if quick else max(64 * MIB, machine.largest_cache())
        return _fastest(self, elements, repeats)

    def caches(self) -> int:
        """Bytes of the last-level cache, or a usual number where the system does not tell."""
        return machine.largest_cache() or 32 * MIB

    def describe(self) -> dict[str, str | int]:
        """What a reader needs to compare figures."""
        return {
            "device": machine.processor_name(),
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        }


class CudaDevice:
    """One GPU; calls queue work and return, so that device events measure it.

    Before each measured call the caches are filled with other data, as they are after a backward
    pass, and the device is kept busy for as long as the host takes to queue the call: what is
    measured is the device's time, with gaps only where a call itself waits for the device. The
    host's time is a figure of its own.
    """

    name = "cuda"

    LONGEST_LEAD = 0.02
    CYCLES = 1.9e9  # a second's, about, at which the device is kept busy

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise BackendError(
                "--device cuda: torch sees no CUDA device; check `nvidia-smi` and that torch is "
                f"built for CUDA (this is torch {torch.__version__})"
            )
        self._lead = 0.0
        self._other_data = torch.ones(  # 256 MiB, far beyond any cache
            64 * MIB, dtype=torch.float32, device=self.name
        )

    def time(self, call: Call) -> float:
        """Seconds that the device takes for what one call queues."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        self._other_data.sum()  # read and not written: nothing is left to write back
        torch.cuda._sleep(int(self._lead * self.CYCLES))  # type: ignore[no-untyped-call]
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def get_ready(self, *calls: Call) -> list[CallFigures]:
        """Learn how long the host takes to queue the calls, and what they allocate.

        A call finds the device idle, and does not wait for it.
        """
        medians = [self._host_seconds(call) for call in calls]
        self._lead = min(1.5 * max(medians), self.LONGEST_LEAD)
        return [
            CallFigures(1e3 * seconds, self._allocated(call) / MIB)
            for seconds, call in zip(medians, calls, strict=True)
        ]

    def _host_seconds(self, call: Call, repeats: int = 15) -> float:
        seconds = []
        for _ in range(repeats):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - begin)
        torch.cuda.synchronize()
        return statistics.median(seconds)

    def _allocated(self, call: Call) -> int:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def room(self) -> float:
        """Bytes that a case may take; some are left for what optimizers allocate in a step."""
        self.release()
        return 0.92 * torch.cuda.mem_get_info()[0]

    def release(self) -> None:
        """Give up memory that is no longer used."""
        gc.collect()
        torch.cuda.empty_cache()

    def bandwidth(self, quick: bool = False, repeats: int = 25) -> float:
        """Bytes a second of the fastest of `traffic.STREAMS`, and of several runs of each."""
        size = 64 * MIB if quick else min(4096 * MIB, int(self.room() / 4))
        self._lead = 0.0005
        return _fastest(self, size // 4, repeats)

    def caches(self) -> int:
        """Bytes of the second-level cache."""
        return int(torch.cuda.get_device_properties(0).L2_cache_size)

    def describe(self) -> dict[str, str | int]:
        """What a reader needs to compare figures."""
        properties = torch.cuda.get_device_properties(0)
        return {
            "device": f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB",
            "driver": machine.driver_version(),
            "CUDA": str(torch.version.cuda),
            "torch": torch.__version__,
            "python": platform.python_version(),
            **machine.versions("cupy-cuda13x", "cupy-cuda12x", "cupy"),
        }


Device = CpuDevice | CudaDevice


def _fastest(device: Device, elements: int, repeats: int) -> float:
    """Bytes a second of the fastest stream; runs of all kinds alternate, the first ones warm up."""
    a, b = (torch.ones(elements, dtype=torch.float32, device=device.name) for _ in range(2))
    calls: dict[str, Call] = {
        "sum(a)": lambda: a.sum(),
        "b = a": lambda: b.copy_(a),
        "a = a*s": lambda: a.mul_(0.5),
        "a = a*s + b": lambda: torch.add(b, a, alpha=0.5, out=a),
    }
    rounds = [
        max(size * elements / device.time(calls[what]) for what, size in traffic.STREAMS.items())
        for _ in range(repeats + 1)
    ]
    return max(rounds[1:])


DEVICES: dict[str, type[CpuDevice] | type[CudaDevice]] = {"cpu": CpuDevice, "cuda": CudaDevice}
