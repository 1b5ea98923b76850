"""The learning rates of an explanation as a picture: a line for each curve, or a band of many."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
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
_LINES_AT_MOST = 30  # more are a block, and drawn as a band
_HUGE = 1e290  # from which on axes overflow


def plot(told: Figures, path: Path, model: str) -> None:
    """Draw an explanation with a scheduler into a file; its ending says in which format.

    Args:
        model: what the title calls the model; empty without one.
    """
    schedule = told.schedule
    if schedule is None or not schedule.rates:
        raise ValueError("there are no learning rates to draw")
    curves = [curve for curve in schedule.rates if can_be_drawn(curve)]
    if not curves:
        raise ValueError("no learning rate is finite")
    with matplotlib.rc_context(_STYLE):
        rows = (min(len(curves), _MANY if len(curves) <= _LINES_AT_MOST else 4) + 1) // 2
        figure = Figure(figsize=(_WIDTH, 3.4 + 0.17 * rows), layout="constrained")
        FigureCanvasAgg(figure)  # draws to files; needs no display
        axes = figure.subplots()
        if len(curves) <= _LINES_AT_MOST:
            _draw_lines(axes, curves, _steps(schedule))
        else:
            _draw_band(axes, curves, _steps(schedule))
        _scale(axes, curves)
        axes.set_xlim(0, max(1, schedule.steps - 1))
        axes.set_xlabel("step (calls of scheduler.step())")
        axes.set_ylabel("learning rate (per step)")
        axes.grid(alpha=0.3, linewidth=0.5)
        figure.suptitle(_title(told, schedule, model))
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
        figure.savefig(path, dpi=300)


def can_be_drawn(curve: Curve) -> bool:
    """Whether any of its values is finite."""
    return any(map(_is_drawn, curve.values))


def _is_drawn(value: float) -> bool:
    return abs(value) < _HUGE


def _draw_lines(axes: Axes, curves: Sequence[Curve], steps: Sequence[int]) -> None:
    named = _named(curves)
    looks = zip(cycle(_COLORS), cycle(_LINES))
    for index, (curve, (color, line)) in enumerate(zip(curves, looks)):  # noqa: B905
        name = textwrap.shorten(label(curve), 60) if index in named else None
        axes.plot(steps, _values(curve, steps), color=color, linestyle=line, label=name)


def _draw_band(axes: Axes, curves: Sequence[Curve], steps: Sequence[int]) -> None:
    """All curves as the band that they fill, and three of them as lines."""
    columns = [
        [value for value in column if not math.isnan(value)] or [math.nan]
        for column in zip(*(_values(curve, steps) for curve in curves), strict=True)
    ]
    axes.fill_between(
        steps,
        [min(column) for column in columns],
        [max(column) for column in columns],
        color=_COLORS[0],
        alpha=0.2,
        linewidth=0,
        label=f"between all {len(curves):,}",
    )
    ranked = sorted(curves, key=_peak)
    shown = {"largest": ranked[-1], "median": ranked[len(ranked) // 2], "least": ranked[0]}
    for (what, curve), color, line in zip(shown.items(), _COLORS, _LINES, strict=False):
        name = f"{what}: {textwrap.shorten(label(curve), 50)}"
        axes.plot(steps, _values(curve, steps), color=color, linestyle=line, label=name)


def _values(curve: Curve, steps: Sequence[int]) -> list[float]:
    """A curve's values, with gaps where they cannot be drawn."""
    values = (curve.values[step] for step in steps)
    return [value if _is_drawn(value) else math.nan for value in values]


def _peak(curve: Curve) -> float:
    return max(filter(_is_drawn, curve.values))


def _scale(axes: Axes, curves: Sequence[Curve]) -> None:
    """A logarithmic axis where the groups' rates are far apart, else one from 0 on."""
    peaks = list(map(_peak, curves))
    if min(peaks) > 0 and max(peaks) > 10 * min(peaks):
        axes.set_yscale("log")
        axes.set_ylim(bottom=max(min(peaks) * _DEPTH, min(map(_least, curves))))
    elif all(value >= 0 for curve in curves for value in curve.values if _is_drawn(value)):
        axes.set_ylim(bottom=0)


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
