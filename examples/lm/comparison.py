"""Runs with different optimizers side by side: a table and a picture."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # draws to files; needs no display
import matplotlib.pyplot as plt

Runs = list[dict[str, Any]]

MARKERS = ("<!-- sweep -->\n", "<!-- /sweep -->\n")
# Okabe & Ito's colors, which color-blind readers can tell apart.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
MARKERS_OF_POINTS = ["o", "s", "X", "D", "^", "v"]


def same_results(runs: Runs) -> list[tuple[list[str], dict[str, Any]]]:
    """Names with the same loss, to the last bit, and the same bytes; with one of their runs."""
    groups: dict[tuple[float, int], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["val_loss"], run["state_bytes"]), []).append(run)
    return [([run["optimizer"] for run in group], group[0]) for group in groups.values()]


def markdown(runs: Runs) -> str:
    """The table, one line for names that end with the same loss and take the same memory."""
    lines = ["| optimizer | validation loss | bytes of state a parameter |", "|---|---|---|"]
    for names, run in same_results(runs):
        per_parameter = run["state_bytes"] / run["parameters"]
        listed = ", ".join(f"`{name}`" for name in names)
        lines.append(f"| {listed} | {run['val_loss']:.4f} | {per_parameter:.2f} |")
    return "\n".join(lines) + "\n"


def plot(runs: Runs, path: Path) -> None:
    """Final loss against bytes of state, one point for names with the same results."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    styles = zip(COLORS, MARKERS_OF_POINTS, strict=True)
    for (names, run), (color, marker) in zip(same_results(runs), cycle(styles), strict=False):
        axes.scatter(
            run["state_bytes"] / 1e6,
            run["val_loss"],
            color=color,
            marker=marker,
            s=48,
            alpha=0.8,
            label=", ".join(names),
            zorder=2,
        )
    axes.set(xlabel="optimizer state, MB", ylabel="validation loss, nats a character")
    axes.set_xlim(0, 1.1 * max(run["state_bytes"] for run in runs) / 1e6)
    axes.margins(y=0.2)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=7, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def find_markers(path: Path) -> tuple[str, str]:
    """What stands before and behind the lines of `MARKERS` in a file."""
    begin, end = MARKERS
    before, found, rest = path.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"{path} has no lines {begin.strip()} and {end.strip()}")
    return before, after


def write_between_markers(path: Path, text: str) -> None:
    """Replace what stands between the lines of `MARKERS` in a file."""
    before, after = find_markers(path)
    begin, end = MARKERS
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")
