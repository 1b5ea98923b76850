"""All that depends on the device: timing, memory bandwidth, and what is reported about it."""

from __future__ import annotations

import gc
import math
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import ClassVar

import torch

MIB = 2**20
Call = Callable[[], object]


class CpuDevice:
    """The host's processor and memory; calls return when the work is done."""

    name = "cpu"
    probe = "a = a*s + b, 12 bytes an element"
    # What is measured where the command line does not say.
    names = ("adamw", "adamw8bit", "adam8bit", "lamb", "lamb8bit")
    startup_names = names
    torch_names = ("torch_fused", "torch_foreach")
    peers = ("bnb_adamw", "bnb_adamw8bit")
    with_peers = False
    cases = ("large", "gpt2", "small")
    dtypes = ("float32",)
    parts = ("time", "memory", "startup")
    seconds, repeats = 8.0, 5
    columns: ClassVar[dict[str, str]] = {}

    def time(self, call: Call) -> float:
        """Seconds that one call takes."""
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin

    def get_ready(self, *calls: Call) -> dict[str, float]:
        """Further figures of the last call; nothing here."""
        return {}

    def room(self) -> float:
        """Bytes that a case may take: as many as there are."""
        return math.inf

    def release(self) -> None:
        """Give up memory that is no longer used."""
        gc.collect()

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


class CudaDevice:
    """One GPU; calls queue work and return, so that device events measure it.

    Before each measured call the caches are filled with other data, as they are after a backward
    pass, and the device is kept busy for as long as the host takes to queue the call: what is
    measured is the device's time, with gaps only where a call itself waits for the device. The
    host's time is a figure of its own.
    """

    name = "cuda"
    probe = "device-to-device copy, bytes read + bytes written"
    names = (
        *("adam", "adamw", "lamb", "adam8bit", "adamw8bit", "lamb8bit"),
        *("paged_adamw:pinned", "paged_adamw8bit:pinned", "paged_adamw8bit:managed"),
    )
    startup_names = ("adamw8bit", "lamb8bit")
    torch_names = ("torch_fused",)
    peers = ("bnb_adamw", "bnb_adamw8bit", "bnb_paged_adamw8bit", "ao_adamw8bit")
    with_peers = True
    cases = ("1m", "100m", "1b", "llama7b", "small2000")
    dtypes = ("float32", "bfloat16")
    parts = ("time", "startup")
    seconds, repeats = 1.0, 10
    columns: ClassVar[dict[str, str]] = {
        "bytes_per_param": "B/param moved",
        "host_ms": "host ms",
        "extra_mib": "MiB in step",
    }

    LONGEST_LEAD = 0.02
    CYCLES = 1.9e9  # a second's, about, at which the device is kept busy

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise SystemExit("benchmark.py: no CUDA device")
        self._lead = 0.0
        self._other_data = torch.ones(64 * MIB, device=self.name)  # 256 MiB, far beyond any cache

    def time(self, call: Call) -> float:
        """Seconds that the device takes for what one call queues."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._other_data.sum()  # read and not written: nothing is left to write back
        torch.cuda._sleep(int(self._lead * self.CYCLES))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def get_ready(self, *calls: Call) -> dict[str, float]:
        """Learn how long the host takes to queue the calls; figures of the last one.

        host_ms: of a call that finds the device idle, and does not wait for it.
        extra_mib: what torch allocates at most during a call.
        """
        medians = [self._host_seconds(call) for call in calls]
        self._lead = min(1.5 * max(medians), self.LONGEST_LEAD)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        calls[-1]()
        torch.cuda.synchronize()
        extra = torch.cuda.max_memory_allocated() - before
        return {"host_ms": 1e3 * medians[-1], "extra_mib": extra / MIB}

    def _host_seconds(self, call: Call, repeats: int = 15) -> float:
        seconds = []
        for _ in range(repeats):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - begin)
        torch.cuda.synchronize()
        return statistics.median(seconds)

    def room(self) -> float:
        """Bytes that a case may take; some are left for what optimizers allocate in a step."""
        self.release()
        return 0.92 * torch.cuda.mem_get_info()[0]

    def release(self) -> None:
        """Give up memory that is no longer used."""
        gc.collect()
        torch.cuda.empty_cache()

    def bandwidth(self, quick: bool = False, repeats: int = 25) -> float:
        """Bytes a second of a large copy on the device, read plus written; the best of several."""
        size = 64 * MIB if quick else min(4096 * MIB, int(self.room() / 4))
        a = torch.rand(size // 4, device=self.name)
        b = torch.empty_like(a)
        self._lead = 0.0005
        seconds = [self.time(lambda: b.copy_(a)) for _ in range(repeats + 1)]
        return 2 * a.nbytes / min(seconds[1:])

    def describe(self) -> dict[str, object]:
        """What a reader needs to compare figures."""
        properties = torch.cuda.get_device_properties(0)
        return {
            "device": f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB",
            "driver": driver_version(),
            "cuda": torch.version.cuda,
            "torch": torch.__version__,
            "cupy": version_of("cupy-cuda13x", "cupy-cuda12x", "cupy"),
            "bitsandbytes": version_of("bitsandbytes"),
            "torchao": version_of("torchao"),
            "python": platform.python_version(),
        }


Device = CpuDevice | CudaDevice
DEVICES: dict[str, type[CpuDevice] | type[CudaDevice]] = {"cpu": CpuDevice, "cuda": CudaDevice}


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


def driver_version() -> str:
    """The NVIDIA driver's version, where its tool tells it."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.split("\n")[0].strip()


def version_of(*packages: str) -> str:
    """The version of the first of these packages that is installed."""
    for package in packages:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return "not installed"
