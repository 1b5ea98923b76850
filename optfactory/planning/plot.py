"""A plan as a picture: what every name would take, as stacked bars."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from optfactory.planning.figures import Alternative, PlanFigures
from optfactory.planning.kinds import KINDS, by_kind
from optfactory.planning.sizes import OF_OPTIMIZERS
from optfactory.planning.text import headline

_GIB = 1024**3
_WIDTH = 7.2  # inches: a page's, or two columns of a paper
_STYLE = {
    "font.size": 7,
    "figure.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def plot(plan: PlanFigures, path: Path, model: str) -> None:
    """Draw a plan into a file; its ending says in which format.

    Args:
        model: what the title calls the model.
    """
    bars = [other for other in plan.alternatives if not other.problem]
    names = [textwrap.fill(other.name, 40) for other in bars]
    lines = len(bars) + sum(name.count("\n") for name in names)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 1.2 + 0.19 * lines), layout="constrained")
        FigureCanvasAgg(figure)  # draws to files; needs no display
        axes = figure.subplots()
        ends = _draw_bars(axes, plan, bars)
        axes.set_yticks(range(len(bars)), names)
        axes.set_ylim(len(bars) - 0.4, -0.6)
        for label, other in zip(axes.get_yticklabels(), bars, strict=True):
            label.set_fontweight("bold" if other.name == plan.config.name else "normal")
        _mark_memory(axes, plan, 1.08 * max(ends))
        figure.suptitle(_title(plan, model))
        figure.legend(loc="outside lower center", ncols=4, frameon=False)
        figure.savefig(path, dpi=300)


def _title(plan: PlanFigures, model: str) -> str:
    """The model, the device, and the chosen optimizer, whose name is bold below."""
    device = plan.shares[0].device if plan.shares else "cpu"
    lines = (f"{model} on {device}", headline(plan))
    return "\n".join(textwrap.fill(line, 110) for line in lines)


def _draw_bars(axes: Axes, plan: PlanFigures, bars: Sequence[Alternative]) -> list[float]:
    """The bars with their sums, which are returned."""
    base = [share for share in plan.shares if share.what not in OF_OPTIMIZERS]
    ends = [0.0] * len(bars)
    sizes = [by_kind([*base, *other.shares]) for other in bars]
    for kind in KINDS:
        widths = [size.get(kind, 0) / _GIB for size in sizes]
        if any(widths):
            look = {"color": kind.color, "hatch": "////" if kind.striped else None}
            axes.barh(range(len(bars)), widths, 0.7, left=ends, label=kind.label, **look)
        ends = [end + width for end, width in zip(ends, widths, strict=True)]
    for line, end in enumerate(ends):
        ground = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # before the dashed line
        axes.text(end, line, f" {end:.3g}", va="center", zorder=3, bbox=ground)
    return ends


def _mark_memory(axes: Axes, plan: PlanFigures, end: float) -> None:
    """What there is, as a line if that is near the bars; the axis ends behind both."""
    label = "GiB, without activations"
    if plan.memory is not None and plan.memory / _GIB > 2 * end:
        label += f"; {plan.memory / _GIB:.3g} GiB are available"
    elif plan.memory is not None:
        end = max(end, 1.04 * plan.memory / _GIB)
        axes.axvline(plan.memory / _GIB, color="black", linestyle="--", linewidth=1)
        axes.text(plan.memory / _GIB, -0.7, "available", ha="center", va="bottom")
    axes.set_xlim(0, end)
    axes.set_xlabel(label)
