"""The learning rates of an explanation as a picture: one line for each curve."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from optfactory.explaining.figures import Curve, Figures, Schedule
from optfactory.explaining.text import call, label

# Okabe & Ito's colors, which color-blind readers can tell apart, and line styles for print.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
_LINES = ("-", "--", "-.", ":", (0, (6, 2, 1, 2, 1, 2)))
_WIDTH = 7.2  # inches: a page's, or two columns of a paper
_STYLE = {
    "font.size": 8,
    "figure.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.4,
}
_POINTS = 2000  # of a curve: more are not seen, and make large files
_DEPTH = 1e-2  # what a logarithmic axis shows below the lowest peak
_MANY = 12  # curves that a legend names; of more, every so many


def plot(told: Figures, path: Path, model: str) -> None:
    """Draw an explanation with a scheduler into a file; its ending says in which format.

    Args:
        model: what the title calls the model; empty without one.
    """
    schedule = told.schedule
    if schedule is None or not schedule.rates:
        raise ValueError("there are no learning rates to draw")
    curves = schedule.rates
    with matplotlib.rc_context(_STYLE):
        named = _named(curves)
        rows = (len(named) + 1) // 2
        figure = Figure(figsize=(_WIDTH, 3.4 + 0.17 * rows), layout="constrained")
        FigureCanvasAgg(figure)  # draws to files; needs no display
        axes = figure.subplots()
        looks = zip(cycle(_COLORS), cycle(_LINES))
        for index, (curve, (color, line)) in enumerate(zip(curves, looks)):  # noqa: B905
            steps = _steps(schedule)
            name = textwrap.shorten(label(curve), 60) if index in named else None
            values = [curve.values[step] for step in steps]
            axes.plot(steps, values, color=color, linestyle=line, label=name)
        peaks = [max(curve.values) for curve in curves]
        if min(peaks) > 0 and max(peaks) > 10 * min(peaks):
            axes.set_yscale("log")
            axes.set_ylim(bottom=max(min(peaks) * _DEPTH, min(map(_least, curves))))
        else:
            axes.set_ylim(bottom=0)
        axes.set_xlim(0, max(1, schedule.steps - 1))
        axes.set_xlabel("step (calls of scheduler.step())")
        axes.set_ylabel("learning rate (per step)")
        axes.grid(alpha=0.3, linewidth=0.5)
        figure.suptitle(_title(told, schedule, model))
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
        figure.savefig(path, dpi=300)


def _title(told: Figures, schedule: Schedule, model: str) -> str:
    first = f"{told.config.name} for {model}" if model else told.config.name
    lines = (first, call(schedule))
    return "\n".join(textwrap.fill(line, 100) for line in lines)


def _named(curves: Sequence[Curve]) -> set[int]:
    """Which curves the legend names."""
    count = len(curves)
    if count <= _MANY:
        return set(range(count))
    return {index * (count - 1) // (_MANY - 1) for index in range(_MANY)}


def _steps(schedule: Schedule) -> list[int]:
    """The steps that are drawn: all, or so many that corners stay where they are."""
    stride = max(1, schedule.steps // _POINTS)
    return sorted({*range(0, schedule.steps, stride), *schedule.milestones})


def _least(curve: Curve) -> float:
    """The lowest rate that a logarithmic axis can show."""
    return min((value for value in curve.values if value > 0), default=1.0)
