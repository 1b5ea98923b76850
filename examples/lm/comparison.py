"""Runs with different optimizers side by side: a table and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # draws to files; needs no display
import matplotlib.pyplot as plt

Runs = list[dict[str, Any]]

MARKERS = ("<!-- sweep -->\n", "<!-- /sweep -->\n")
# Okabe & Ito's colors, which color-blind readers can tell apart.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]


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
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    points = same_results(runs)
    for color, (names, run) in zip(COLORS * len(points), points, strict=False):
        axes.scatter(run["state_bytes"] / 1e6, run["val_loss"], color=color, s=36, zorder=2)
        label = "\n".join(", ".join(names[i : i + 2]) for i in range(0, len(names), 2))
        axes.annotate(
            label,
            (run["state_bytes"] / 1e6, run["val_loss"]),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
            color=color,
        )
    axes.set(xlabel="optimizer state, MB", ylabel="validation loss, nats a character")
    axes.set_xlim(0, 1.45 * max(run["state_bytes"] for run in runs) / 1e6)
    axes.margins(y=0.25)
    axes.grid(alpha=0.3)
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
