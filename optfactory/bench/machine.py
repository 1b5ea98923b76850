"""Names and versions of what figures depend on."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path

MIB = 2**20


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


def free_memory() -> float:
    """Bytes that can be taken without swapping, infinite where the system does not tell."""
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    sizes = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    return float(sizes[0]) if sizes else float("inf")


def driver_version() -> str:
    """The NVIDIA driver's version, where its tool tells it."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.split("\n")[0].strip()


def versions(*packages: str) -> dict[str, str | int]:
    """The versions of those packages that are installed."""
    found: dict[str, str | int] = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
