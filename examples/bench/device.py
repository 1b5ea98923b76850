"""All that depends on the device: timing, memory bandwidth, and what is reported about it."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

MIB = 2**20


class CpuDevice:
    """The host's processor and memory; calls return when the work is done."""

    name = "cpu"

    def time(self, call: Callable[[], object]) -> float:
        """Seconds that one call takes."""
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin

    def bandwidth(self, quick: bool = False, repeats: int = 25) -> float:
        """Bytes a second of an in-place a = a*s + b over arrays far larger than the caches.

        Twelve bytes an element: a and b are read, a is written. The best of several runs.
        """
        elements = MIB if quick else max(64 * MIB, largest_cache() // 2)  # two fp32 arrays
        a, b = torch.ones(elements), torch.ones(elements)
        seconds = [self.time(lambda: torch.add(b, a, alpha=0.5, out=a)) for _ in range(repeats + 1)]
        return 12 * elements / min(seconds[1:])

    def describe(self) -> dict[str, object]:
        """What a reader needs to compare figures."""
        return {
            "device": f"{processor_name()}, {torch.get_num_threads()} threads",
            "capability": torch.backends.cpu.get_cpu_capability(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        }


DEVICES = {"cpu": CpuDevice}


def processor_name() -> str:
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def largest_cache() -> int:
    """Bytes of the last-level cache, 0 where the system does not tell."""
    units = {"K": 2**10, "M": MIB}
    sizes = [
        file.read_text().strip()
        for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    ]
    return max(
        (int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=0
    )
