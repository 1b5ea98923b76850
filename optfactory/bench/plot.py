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
from matplotlib.ticker import FuncFormatter

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
LONGEST = 8.0  # times torch fused; a panel with longer bars is logarithmic
_ACROSS = 3  # panels side by side
_WIDTH = 7.2  # inches: a page's, or two columns of a paper
_LETTERS = 17 * _WIDTH  # that fit across, about
_LABEL = 30  # letters of an optimizer's name in one line
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
    room = _LETTERS - min(_LABEL, max(map(len, labels)))
    for panel, rows in zip(panels, groups, strict=False):
        _draw(panel, rows, labels)
        title = textwrap.fill(rows[0].text, int(room / across) - 2)
        panel.set_title(f"{title}\n{rows[0].dtype}")
    for panel in list(panels)[len(groups) :]:
        panel.set_axis_off()
    libraries = dict.fromkeys(row.library for rows in groups for row in rows)
    handles = [Patch(color=COLORS[library], label=library) for library in libraries]
    handles.append(Line2D([], [], color="black", label="memory-bandwidth limit"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


def _draw(panel: Axes, rows: list[Row], labels: list[str]) -> None:
    """One case and dtype; an optimizer has the same line in all panels."""
    for row in rows:
        line = labels.index(row.optimizer)
        panel.barh(line, row.ns_per_param, 0.7, color=COLORS[row.library])
        panel.vlines(row.limit, line - 0.45, line + 0.45, color="black", linewidth=1)
        furthest = max(row.ns_per_param, row.limit)
        panel.text(furthest, line, f" {number(row.ns_per_param)}", va="center")
    shortest = min(min(row.ns_per_param, row.limit) for row in rows)
    longest = max(max(row.ns_per_param, row.limit) for row in rows)
    if longest > LONGEST * min(1e6 * row.fused_ms / row.elements for row in rows):
        panel.set_xscale("log")
        panel.set_xlim(shortest / 2, longest * (2 * longest / shortest) ** 0.25)
        panel.set_xlabel("ns/param and step (log)")
    else:
        panel.set_xlim(0, 1.2 * longest)  # with room for numbers
        panel.set_xlabel("ns/param and step")
    panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    panel.set_yticks(range(len(labels)), [textwrap.fill(label, _LABEL) for label in labels])
    panel.set_ylim(len(labels) - 0.4, -0.6)
