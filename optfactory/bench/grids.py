"""The figures as text: tables that the screen, a markdown file and the documentation show alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from optfactory.bench.cases import CASES
from optfactory.bench.results import MOST_ROUNDS, Figures, Row


@dataclass(frozen=True)
class Grid:
    """A table of text: title, headings, lines, and remarks below it.

    Attributes:
        words: how many columns hold words, and no numbers; they come first.
    """

    title: str
    headings: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    remarks: tuple[str, ...] = ()
    words: int = 1


_TIMES: dict[str, Callable[[Row], str]] = {
    "optimizer": lambda row: row.optimizer,
    "ms/step": lambda row: number(row.ms),
    "ns/param": lambda row: number(row.ns_per_param),
    "x limit": lambda row: number(row.times_limit),
    "x fused": lambda row: number(row.times_fused) + ("?" if row.unsteady else ""),
    "best": lambda row: number(row.best_times_fused),
    "state B/param": lambda row: number(row.state_bytes_per_param),
}
_GPU_TIMES: dict[str, Callable[[Row], str]] = {
    "moved B/param": lambda row: number(row.moved_bytes_per_param),
    "host ms": lambda row: number(row.host_ms),
    "MiB in step": lambda row: number(row.extra_mib),
}


def number(value: float | None) -> str:
    """Three digits, or two decimals where that is more."""
    if value is None:
        return ""
    return f"{value:,.{0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2}f}"


def heading(figures: Figures) -> str:
    """The machine, its bandwidth and the versions in one line."""
    machine = dict(figures.machine)
    parts = [str(machine.pop("device"))]
    if "threads" in machine:
        parts.append(f"{machine.pop('threads')} threads")
    parts.append(f"{number(figures.bandwidth / 1e9)} GB/s ({figures.probe})")
    parts += [f"{key} {value}" for key, value in machine.items()]
    return ", ".join([*parts, f"optfactory {figures.optfactory}"])


def all_grids(figures: Figures) -> list[Grid]:
    """Every table of a run, in the order of its parts."""
    grids = time_grids(figures)
    if figures.memory:
        grids.append(memory_grid(figures))
    if figures.startup:
        grids.append(startup_grid(figures))
    return grids


def time_grids(figures: Figures) -> list[Grid]:
    """Step times: a table for each case and dtype."""
    return [_time_grid(figures, *key, rows) for key, rows in figures.groups().items()]


def _time_grid(figures: Figures, case: str, dtype: str, rows: list[Row]) -> Grid:
    on_gpu = any(row.host_ms is not None for row in rows)
    columns = _TIMES | (_GPU_TIMES if on_gpu else {})
    lines = tuple(tuple(text(row) for text in columns.values()) for row in rows)
    remarks = [
        f"{absent.optimizer}: {absent.reason}"
        for absent in figures.absent
        if (absent.case, absent.dtype) in (("", ""), (case, dtype))
    ]
    if any(row.unsteady for row in rows):
        spread = max(row.fused_ms / row.best_fused_ms for row in rows)
        remarks.append(
            f"?: torch fused varied {spread:.1f}-fold and the ratio with it, a busy machine, "
            f"after {MOST_ROUNDS} rounds: trust only 'best'"
        )
    title = f"{case}: {rows[0].text if rows else CASES[case].text}, {dtype}"
    return Grid(title, tuple(columns), lines, tuple(remarks))


def memory_grid(figures: Figures) -> Grid:
    """Peak memory."""
    lines = tuple(
        (row.case, row.dtype, row.optimizer, number(row.extra_mib), number(row.transient_mib))
        for row in figures.memory
    )
    title = "peak memory beyond parameters, gradients and states, MiB (exact to about 0.2)"
    return Grid(title, ("case", "dtype", "optimizer", "three steps", "one step"), lines, words=3)


def startup_grid(figures: Figures) -> Grid:
    """Cost of the first step."""
    lines = tuple(
        (
            *(row.optimizer, row.cache),
            *(number(x) for x in (row.imported, row.built, row.first, row.later, row.overhead)),
        )
        for row in figures.startup
    )
    keys = ("import", "build", "first step", "later step", "overhead")
    title = "start with a cold and a warm cache of kernels, s (overhead: all but a later step)"
    return Grid(title, ("optimizer", "cache", *keys), lines, words=2)
