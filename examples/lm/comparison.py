"""Runs with different optimizers side by side: a table and a picture."""

from __future__ import annotations

import textwrap
from collections import Counter
from itertools import cycle
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("Agg")  # draws to files; needs no display
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from optfactory import get_optimizer_info

Runs = list[dict[str, Any]]

MARKERS = ("<!-- sweep -->\n", "<!-- /sweep -->\n")
# Okabe & Ito's colors, which color-blind readers can tell apart.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
# Of lines by width.
WIDTHS = {
    "32bit": ("black", (1, 0)),
    "16bit": (COLORS[5], (4, 1)),
    "8bit": (COLORS[1], (2, 1)),
    "fp8": (COLORS[2], (1, 1)),
    "4bit": (COLORS[3], (1, 2)),
}
MARKERS_OF_POINTS = ["o", "s", "X", "D", "^", "v"]


def same_results(runs: Runs) -> list[tuple[list[str], Runs]]:
    """Names whose first seed ends with the same loss, to the last bit, and the same bytes.

    With the runs of all seeds of the first of them.
    """
    groups: dict[tuple[float, int], list[str]] = {}
    for run in runs:
        if run["seed"] == runs[0]["seed"]:
            key = (run["val_loss"], run["state_bytes"])
            groups.setdefault(key, []).append(run["optimizer"])
    return [
        (names, [run for run in runs if run["optimizer"] == names[0]]) for names in groups.values()
    ]


def losses(runs: Runs) -> list[float]:
    """The final losses."""
    return [run["val_loss"] for run in runs]


def markdown(runs: Runs) -> str:
    """The table, one line for names that end with the same loss and take the same memory."""
    seeds = len({run["seed"] for run in runs})
    head = f"validation loss, mean of {seeds} seeds (range)" if seeds > 1 else "validation loss"
    lines = [f"| optimizer | {head} | bytes of state a parameter |", "|---|---|---|"]
    for names, group in same_results(runs):
        per_parameter = group[0]["state_bytes"] / group[0]["parameters"]
        listed = ", ".join(f"`{name}`" for name in names)
        found = losses(group)
        loss = f"{mean(found):.4f}"
        loss += f" ({min(found):.4f} to {max(found):.4f})" if len(found) > 1 else ""
        lines.append(f"| {listed} | {loss} | {per_parameter:.2f} |")
    return "\n".join(lines) + "\n"


def plot(runs: Runs, path: Path) -> None:
    """Final loss against bytes of state: of each seed a point, and a line through their range.

    Names with the same results are one color.
    """
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    styles = cycle(zip(COLORS, MARKERS_OF_POINTS, strict=True))
    groups = same_results(runs)
    most = max(run["state_bytes"] for run in runs) / 1e6
    beside: Counter[int] = Counter()  # of equal sizes, which would hide each other
    for (names, group), (color, marker) in zip(groups, styles, strict=False):
        size, found = group[0]["state_bytes"], losses(group)
        x = size / 1e6 + 0.02 * most * beside[size]
        beside[size] += 1
        axes.vlines(x, min(found), max(found), color=color, linewidth=1.5, alpha=0.5)
        axes.hlines(mean(found), x - 0.008 * most, x + 0.008 * most, color=color)
        label = textwrap.fill(", ".join(names), 58)
        axes.scatter([x] * len(found), found, s=28, color=color, marker=marker, label=label)
    axes.set(xlabel="optimizer state, MB (equal sizes stand side by side)")
    axes.set(ylabel="validation loss, nats a character")
    axes.set_xlim(0, 1.15 * most)
    axes.margins(y=0.1)
    axes.grid(alpha=0.3)
    axes.set_title(_title(runs), fontsize=8)
    figure.legend(loc="outside lower center", ncols=2, fontsize=7, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_curves(runs: Runs, path: Path) -> None:
    """Validation loss against step: the mean of the seeds, and their range as a band.

    Names with the same results are one color. What is far above the unigram baseline is cut off.
    """
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for (names, group), color in zip(same_results(runs), cycle(COLORS), strict=False):
        steps = [step for step, _ in group[0]["val_curve"]]
        curves = [[loss for _, loss in run["val_curve"]] for run in group]
        at_steps = list(zip(*curves, strict=True))
        label = f"{', '.join(names)}, lr {group[0]['lr']:g}"
        axes.plot(steps, [mean(found) for found in at_steps], color=color, label=label)
        low, high = [min(found) for found in at_steps], [max(found) for found in at_steps]
        axes.fill_between(steps, low, high, color=color, alpha=0.25, linewidth=0)
    unigrams = runs[0]["unigram_loss"]
    axes.axhline(unigrams, color="grey", linestyle="--", label="unigram baseline")
    axes.set(xlabel="training step", ylabel="validation loss, nats a character")
    axes.set_ylim(top=1.02 * max(unigrams, *losses(runs)))
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.set_title(_title(runs), fontsize=8)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_families(runs: Runs, path: Path) -> None:
    """Validation loss against step: a panel for each family, a line for each width of its state.

    Of several seeds the first is drawn.
    """
    seed = runs[0]["seed"]
    families: dict[str, Runs] = {}
    for run in runs:
        if run["seed"] == seed:
            families.setdefault(get_optimizer_info(run["optimizer"]).family, []).append(run)
    across = min(4, len(families))
    down = -(-len(families) // across)
    figure, grid = plt.subplots(
        nrows=down,
        ncols=across,
        figsize=(2.3 * across, 1 + 1.7 * down),
        layout="constrained",
        squeeze=False,
        sharex=True,
        sharey=True,
    )
    panels = list(grid.flat)
    for panel, (family, group) in zip(panels, sorted(families.items()), strict=False):
        _draw_family(panel, family, group)
    for panel in panels[len(families) :]:
        panel.set_axis_off()
    top = 1.02 * max(runs[0]["unigram_loss"], *losses(runs))
    panels[0].set(ylim=(0.97 * min(losses(runs)), top), xlim=(0, None))
    known = {line.get_label(): line for panel in panels for line in panel.lines}
    figure.legend(
        [known[width] for width in WIDTHS if width in known],
        [width for width in WIDTHS if width in known],
        loc="outside lower center",
        ncols=len(WIDTHS),
        frameon=False,
        fontsize=8,
    )
    grid[-1][0].set_xlabel("training step", fontsize=8)
    figure.supylabel("validation loss, nats a character", fontsize=8)
    figure.suptitle(_title(runs).rpartition("\n")[0], fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_family(panel: Axes, family: str, runs: Runs) -> None:
    """One family: its widths lie on one another where they train alike, hence the dashes."""
    for run in runs:
        width = run["optimizer"].removeprefix("paged_").removeprefix(family) or "32bit"
        steps, curve = zip(*run["val_curve"], strict=True)
        color, dashes = WIDTHS[width]
        panel.plot(steps, curve, color=color, dashes=dashes, linewidth=1.2, label=width)
    panel.set_title(f"{family}, lr {runs[0]['lr']:g}", fontsize=8)
    panel.tick_params(labelsize=7)
    panel.grid(alpha=0.3)


def _title(runs: Runs) -> str:
    """Model, device, and the names that did best."""
    groups = same_results(runs)
    best, _ = min(groups, key=lambda group: mean(losses(group[1])))
    seeds = len({run["seed"] for run in runs})
    run = runs[0]
    size = f"{run['parameters'] / 1e6:.2f} M parameters"
    lines = (
        f"{run['model']}, {size}, {seeds} seed{'s' * (seeds > 1)}",
        run["device"],
        f"lowest mean loss: {', '.join(best)}",
    )
    return "\n".join(textwrap.fill(line, 95) for line in lines)


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
