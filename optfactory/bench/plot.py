"""ns/param as horizontal bars, one panel for each case and dtype, with the memory limit marked."""

from __future__ import annotations

import textwrap
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from optfactory.bench.grids import heading, number
from optfactory.bench.results import Figures, Row
from optfactory.errors import ConfigError

# Okabe & Ito's colors, which color-blind readers can tell apart.
COLORS = {
    "optfactory": "#0072B2",
    "torch": "#999999",
    "bitsandbytes": "#E69F00",
    "torchao": "#CC79A7",
    "timm": "#009E73",
}
LONGEST = 8.0  # times torch fused; longer bars are cut, and say how long they are
_ACROSS = 3  # panels side by side
_WIDTH = 7.2  # inches: a page's, or two columns of a paper
_STYLE = {
    "font.size": 7,
    "axes.titlesize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.titlesize": 6,
    "svg.fonttype": "none",  # text stays text
}


def plot(figures: Figures, path: Path) -> None:
    """Draw the step times into a file; its ending says in which format.

    Raises:
        ConfigError: the figures hold no step times.
    """
    groups = [rows for rows in figures.groups().values() if rows]
    if not groups:
        raise ConfigError("there are no step times to draw; measure with --parts time")
    labels = list(dict.fromkeys(row.optimizer for row in figures.rows))
    with matplotlib.rc_context(_STYLE):
        figure = _panels(groups, labels)
        figure.suptitle(textwrap.fill(heading(figures), 120))
        figure.savefig(path, dpi=300)


def _panels(groups: list[list[Row]], labels: list[str]) -> Figure:
    across = min(len(groups), _ACROSS)
    down = -(-len(groups) // _ACROSS)
    height = down * (0.8 + 0.17 * len(labels)) + 0.7
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)  # draws to files; needs no display
    panels = figure.subplots(down, across, squeeze=False, sharey=True).flat
    for panel, rows in zip(panels, groups, strict=False):
        _draw(panel, rows, labels)
    for panel in list(panels)[len(groups) :]:
        panel.set_axis_off()
    libraries = dict.fromkeys(row.library for rows in groups for row in rows)
    handles = [Patch(color=COLORS[library], label=library) for library in libraries]
    handles.append(Line2D([], [], color="black", label="memory-bandwidth limit"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


def _draw(panel: Axes, rows: list[Row], labels: list[str]) -> None:
    """One case and dtype; an optimizer has the same line in all panels."""
    longest = LONGEST * min(1e6 * row.fused_ms / row.elements for row in rows)
    end = 1.2 * max(min(row.ns_per_param, longest) for row in rows)  # with room for numbers
    for row in rows:
        line, length, text = labels.index(row.optimizer), row.ns_per_param, number(row.ns_per_param)
        panel.barh(line, min(length, end), 0.7, color=COLORS[row.library])
        panel.vlines(row.limit, line - 0.45, line + 0.45, color="black", linewidth=1)
        if length > longest:
            text += " → " if length > end else " "
            panel.text(min(length, end), line, text, ha="right", va="center", color="white")
        else:
            panel.text(length + 0.02 * end, line, text, va="center")
    text = "\n".join(textwrap.wrap(rows[0].text, 36))
    panel.set_title(f"{text}\n{rows[0].dtype}")
    panel.set_yticks(range(len(labels)), labels)
    panel.set_ylim(len(labels) - 0.4, -0.6)
    panel.set_xlim(0, end)
    panel.set_xlabel("ns/param and step")
