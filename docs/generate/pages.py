"""All generated pages: written, or compared with what is there."""

from __future__ import annotations

from pathlib import Path

from docs.generate.markdown import GENERATED
from docs.generate.names_page import hyperparameters_page, names_page
from docs.generate.optimizer_page import optimizer_page
from optfactory.build.wheel.variants import is_built_in
from optfactory.families import families

FOLDER = Path(__file__).parents[1] / "pages" / "reference"


def expected_pages() -> dict[str, str]:
    """File name below `reference/` -> text, of every generated page."""
    built_in = [family for family, schema in families().items() if is_built_in(schema)]
    return {
        "names.md": names_page(),
        "hyperparameters.md": hyperparameters_page(),
        **{f"optimizers/{family}.md": optimizer_page(family) for family in built_in},
    }


def stale_pages(folder: Path = FOLDER) -> list[str]:
    """What is wrong with the pages in `folder`; empty if nothing is."""
    expected = expected_pages()
    problems = []
    for name, text in expected.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name}: missing")
        elif path.read_text(encoding="utf-8") != text:
            problems.append(f"{name}: differs from the code")
    return problems + [f"{name}: of no family" for name in _others(folder, expected)]


def write_pages(folder: Path = FOLDER) -> list[str]:
    """Bring `folder` up to date; returns the names of the pages written or removed."""
    expected = expected_pages()
    changed = []
    for name, text in expected.items():
        path = folder / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            changed.append(name)
    for name in _others(folder, expected):
        (folder / name).unlink()
        changed.append(name)
    return changed


def _others(folder: Path, expected: dict[str, str]) -> list[str]:
    """Generated pages that are of nothing any more."""
    paths = [path for path in folder.rglob("*.md") if str(path.relative_to(folder)) not in expected]
    return [
        str(path.relative_to(folder))
        for path in paths
        if GENERATED in path.read_text(encoding="utf-8")
    ]
