"""`optfactory bench`: read the words, measure, print the tables, write the files."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from optfactory.bench import grids, markdown, results
from optfactory.bench.arguments import Settings, parse
from optfactory.bench.results import Figures
from optfactory.errors import OptFactoryError


def run(words: Sequence[str]) -> int:
    """Do what the words behind `optfactory bench` say; returns the exit code.

    Raises:
        OptFactoryError: an unknown name, no such device, or a package that is not installed.
    """
    settings = parse(words)
    _require("rich")
    if settings.plot:
        _require("matplotlib")
    shown = Shown(settings)
    if settings.source:
        figures = results.read_json(settings.source)
    else:
        # Deferred: it loads torch.
        from optfactory.bench.session import measure

        figures = measure(settings, shown.update)
    shown.update(figures)
    _write_files(settings, figures)
    return 0


class Shown:
    """Prints each table once, and keeps the JSON up to date, while figures come in."""

    def __init__(self, settings: Settings) -> None:
        self._json = settings.json
        self._prints = settings.markdown != markdown.STDOUT
        self._printed: set[str] = set()  # headings and titles

    def update(self, figures: Figures) -> None:
        """Show what is new."""
        from optfactory.bench.show import show

        if self._json:
            self._json.write_text(results.to_json(figures), encoding="utf-8")
        if not self._prints:
            return
        heading = grids.heading(figures)
        if heading not in self._printed:
            print(heading)
        new = [grid for grid in grids.all_grids(figures) if grid.title not in self._printed]
        for grid in new:
            show(grid)
        self._printed |= {heading, *(grid.title for grid in new)}


def _write_files(settings: Settings, figures: Figures) -> None:
    if settings.markdown == markdown.STDOUT:
        print(markdown.render(figures), end="")
    elif settings.markdown:
        markdown.write(settings.markdown, figures)
    if settings.plot:
        from optfactory.bench.plot import plot

        plot(figures, settings.plot)


def _require(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise OptFactoryError(
            f"`optfactory bench` needs {package}, which is not installed; "
            f'run: pip install "optfactory[bench]", or: pip install {package}'
        )
