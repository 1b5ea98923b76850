"""The tables and the progress bar on the screen, by rich."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from optfactory.bench.grids import Grid
from optfactory.bench.measure import Tick

_REFRESH = 0.2  # seconds
_WIDE = 8  # characters beyond which a heading takes two lines


def show(grid: Grid) -> None:
    """Print a table on stdout; cells are never cut, however narrow the terminal."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for i, text in enumerate(grid.headings):
        if len(text) > _WIDE:
            text = text.replace(" ", "\n", 1)
        table.add_column(text, justify="left" if i < grid.words else "right", no_wrap=True)
    for line in grid.lines:
        table.add_row(*line)
    natural = Console(width=10_000).measure(table).maximum
    console = Console(width=max(natural, Console().width), highlight=False)
    console.print(f"\n{grid.title}", markup=False, style="bold", soft_wrap=True)
    console.print(table)
    for remark in grid.remarks:
        console.print(remark, markup=False, soft_wrap=True)


@contextmanager
def progress(title: str, count: int) -> Iterator[Tick]:
    """A bar on stderr for `count` candidates, which vanishes at the end.

    It is drawn when it is told of progress, between steps: a thread that draws would disturb them.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    silent = not console.is_terminal
    bar = Progress(*columns, console=console, auto_refresh=False, transient=True, disable=silent)
    task = bar.add_task(title, total=count)
    begun: dict[str, int] = {}
    drawn = 0.0

    def tick(label: str, done: float) -> None:
        nonlocal drawn
        completed = begun.setdefault(label, len(begun)) + done
        bar.update(task, completed=completed, description=f"{title} {label}")
        if done == 0 or time.monotonic() > drawn + _REFRESH:
            bar.refresh()
            drawn = time.monotonic()

    with bar:
        yield tick
