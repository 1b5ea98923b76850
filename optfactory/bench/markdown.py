"""The tables as markdown, also inside a file that has more in it, such as a page."""

from __future__ import annotations

from pathlib import Path

from optfactory.bench.grids import Grid, all_grids, heading
from optfactory.bench.results import Figures

STDOUT = Path("-")
BEGIN, END = "<!-- bench -->", "<!-- /bench -->"


def render(figures: Figures) -> str:
    """Machine and tables."""
    return "\n\n".join([heading(figures), *map(_table, all_grids(figures))]) + "\n"


def _table(grid: Grid) -> str:
    rule = ["---" if i < grid.words else "---:" for i in range(len(grid.headings))]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in (grid.headings, rule, *grid.lines))
    return "\n\n".join([f"**{grid.title}**", table, *grid.remarks])


def holds_markers(path: Path) -> bool:
    """Whether the file does not exist yet, or has a place for the tables."""
    if not path.exists():
        return True
    _, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    return bool(begin) and END in rest


def write(path: Path, figures: Figures) -> None:
    """Put the tables between the markers of a file; a new one gets both."""
    text = path.read_text(encoding="utf-8") if path.exists() else f"{BEGIN}\n{END}\n"
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(f"{before}{BEGIN}\n\n{render(figures)}\n{END}{after}", encoding="utf-8")
