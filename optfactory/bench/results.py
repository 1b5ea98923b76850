"""What was measured, and its JSON. Loads no torch.

The JSON holds `Figures` as it is: `format`, `optfactory` (version), `machine`, `bandwidth` (bytes
a second), `probe`, and the lists `rows`, `absent`, `memory` and `startup`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from optfactory.bench.traffic import BEYOND_CACHES
from optfactory.errors import ConfigError

FORMAT = 1
MOST_ROUNDS = 5  # of measuring, on a busy machine


@dataclass(frozen=True)
class Row:
    """Step times of one optimizer in one case and dtype.

    Attributes:
        library: whose it is: optfactory, torch, bitsandbytes, ...
        text: the case in words.
        elements: how many the tensors have together.
        pairs: how many steps were measured, each beside one of the baseline.
        ms: the median of the steps, milliseconds; `ns_per_param` is the same in nanoseconds over
            the number of elements.
        best_ms: the fastest step, which other load on the machine disturbs least.
        fused_ms: the median of the baseline's steps between the candidate's.
        best_fused_ms: the fastest of those.
        times_limit: `ms` over the time in which the memory can move `moved_bytes_per_param`.
        times_fused: the median of the ratios of neighboring steps.
        best_times_fused: `best_ms / best_fused_ms`.
        host_ms: on a GPU, until a call returns that finds the device idle.
        extra_mib: on a GPU, what torch allocates at most during a step.
        unsteady: other load on the machine hides `times_fused`, however often it was repeated.
    """

    case: str
    text: str
    dtype: str
    optimizer: str
    library: str
    tensors: int
    elements: int
    pairs: int
    ms: float
    ns_per_param: float
    best_ms: float
    fused_ms: float
    best_fused_ms: float
    times_limit: float
    times_fused: float
    best_times_fused: float
    state_bytes_per_param: float
    moved_bytes_per_param: float
    host_ms: float | None = None
    extra_mib: float | None = None
    unsteady: bool = False

    @property
    def moved_bytes(self) -> float:
        """Bytes that a step must move."""
        return self.moved_bytes_per_param * self.elements

    @property
    def limit(self) -> float:
        """What the memory's bandwidth allows, in nanoseconds a parameter."""
        return self.ns_per_param / self.times_limit


@dataclass(frozen=True)
class Absent:
    """An optimizer without figures, and why; `case` and `dtype` are empty if it has none at all."""

    optimizer: str
    reason: str
    case: str = ""
    dtype: str = ""


@dataclass(frozen=True)
class Memory:
    """Peak memory beyond parameters, gradients and states, MiB: of three steps, of a later one."""

    case: str
    dtype: str
    optimizer: str
    extra_mib: float
    transient_mib: float


@dataclass(frozen=True)
class Startup:
    """Seconds of a first step, with a `cold` and a `warm` cache of compiled kernels.

    Attributes:
        imported: loading optfactory, torch being there.
        built: building the optimizer.
        first: its first step.
        later: the median of later steps.
    """

    optimizer: str
    cache: str
    imported: float
    built: float
    first: float
    later: float

    @property
    def overhead(self) -> float:
        """What a training run pays once: all of it but a usual step."""
        return self.imported + self.built + self.first - self.later


@dataclass
class Figures:
    """One run of the benchmark."""

    optfactory: str
    machine: dict[str, str | int]
    bandwidth: float
    probe: str
    rows: list[Row] = field(default_factory=list)
    absent: list[Absent] = field(default_factory=list)
    memory: list[Memory] = field(default_factory=list)
    startup: list[Startup] = field(default_factory=list)
    format: int = FORMAT

    def raise_bandwidth(self, measured: float, caches: int) -> None:
        """Measure all rows against the best bandwidth seen: a stream's, or that of a large step.

        Args:
            measured: of streams, bytes a second.
            caches: bytes that the device's caches hold.
        """
        large = [row for row in self.rows if row.moved_bytes > BEYOND_CACHES * caches]
        measured = max([measured, *(1e3 * row.moved_bytes / row.best_ms for row in large)])
        if measured > self.bandwidth:
            factor = measured / self.bandwidth
            rows = [replace(row, times_limit=row.times_limit * factor) for row in self.rows]
            self.bandwidth, self.rows = measured, rows

    def groups(self) -> dict[tuple[str, str], list[Row]]:
        """The rows of each case and dtype, in the order in which they were measured."""
        found: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            found.setdefault((row.case, row.dtype), []).append(row)
        for absent in self.absent:
            if absent.case:  # perhaps nothing of that case could be measured
                found.setdefault((absent.case, absent.dtype), [])
        return found


def to_json(figures: Figures) -> str:
    """The figures as JSON."""
    return json.dumps(asdict(figures), indent=2) + "\n"


def read_json(path: Path) -> Figures:
    """The figures of an earlier run.

    Raises:
        ConfigError: the file is not there, or not such a file.
    """
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        kinds = {"rows": Row, "absent": Absent, "memory": Memory, "startup": Startup}
        lists = {key: [kind(**row) for row in values[key]] for key, kind in kinds.items()}
        figures = Figures(**(values | lists))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"{path} holds no figures of `optfactory bench`: {error!r}") from error
    if figures.format != FORMAT:
        raise ConfigError(
            f"{path} has format {figures.format}, and this version of optfactory reads {FORMAT}; "
            "measure again, or read it with the version that wrote it"
        )
    return figures
