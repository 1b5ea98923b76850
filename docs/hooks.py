"""What MkDocs calls while it builds: links into the repository, formulas, and generated parts.

Pages link to files of the repository by ordinary relative links, which work on a code host. In the
site each file that is linked becomes a page under `source/`: code in a fence, Markdown as it is,
with its own links treated alike. A link to what does not exist stays, and fails a strict build.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # MkDocs loads this file by its path
    sys.path.insert(0, str(ROOT))

from docs import example_plan  # noqa: E402

PAGES = ROOT / "docs" / "pages"
SOURCE = "source"  # the folder of the site that shows files of the repository
PICTURES = {".png", ".svg"}
LANGUAGES = {
    ".cpp": "cpp",
    ".cu": "cuda",
    ".cuh": "cuda",
    ".h": "cpp",
    ".json": "json",
    ".py": "python",
    ".sh": "bash",
    ".toml": "toml",
    ".yaml": "yaml",
    ".yml": "yaml",
}
# Code, in which nothing is a link; and links, with what stands before the path.
_CODE_OR_LINK = re.compile(
    r"(?P<code>^(?P<fence> *(?:`{3,}|~{3,})).*?^(?P=fence)`* *$|`+[^`\n]+`+)"
    r"|(?P<before>\]\()(?P<path>[^)\s#:]+)(?P<anchor>#[^)\s]*)?(?=\))",
    re.MULTILINE | re.DOTALL,
)


# ---- events ------------------------------------------------------------------------------------


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add formulas to the fences, and the pages of folders to the navigation."""
    fences = config.mdx_configs.setdefault("pymdownx.superfences", {})
    fences["custom_fences"] = [{"name": "math", "class": "math", "format": math_fence}]
    config.nav = expanded_nav(config.nav, PAGES)
    return config


@event_priority(100)  # the plugins are to see these files too
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add each file of the repository that pages link to, and what those link to in turn."""
    todo = [target for file in files.documentation_pages() for target in linked_by(file)]
    seen: set[Path] = set()
    while todo:
        path = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        files.append(source_file(path, config))
        if path.suffix == ".md":
            todo += linked(path.read_text(encoding="utf-8"), path.parent)
    files.append(File.generated(config, example_plan.URI, content=example_plan.example_page()))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Fill in the generated parts of a page, and lead its links to the pages of files."""
    if page.file.generated_by is not None:  # by `source_file`, which has done so
        return markdown
    text = with_generated_parts(markdown)
    return rewritten(text, PAGES / Path(page.file.src_uri).parent, page.file.src_uri)


# ---- links -------------------------------------------------------------------------------------


def linked_by(file: File) -> list[Path]:
    """The files of the repository that a page links to."""
    text = with_generated_parts(Path(file.abs_src_path or "").read_text(encoding="utf-8"))
    return linked(text, PAGES / Path(file.src_uri).parent)


def linked(text: str, folder: Path) -> list[Path]:
    """The files outside of the pages that a text links to, which stands in this folder."""
    targets = (_target(found["path"], folder) for found in _links(text))
    return [path for path in targets if path and not path.is_relative_to(PAGES)]


def rewritten(text: str, folder: Path, uri: str) -> str:
    """A text of this folder with links as the site's page `uri` needs them."""

    def replaced(found: re.Match[str]) -> str:
        path = found["path"] and _target(found["path"], folder)
        if not path:
            return found[0]
        to = os.path.relpath(site_uri(path), os.path.dirname(uri) or ".")
        return f"{found['before']}{to}{found['anchor'] or ''}"

    return _CODE_OR_LINK.sub(replaced, text)


def site_uri(path: Path) -> str:
    """Where the site has a file of the repository, as a path below its pages."""
    if path.is_relative_to(PAGES):
        return path.relative_to(PAGES).as_posix()
    plain = path.suffix in PICTURES or path.suffix == ".md"
    return f"{SOURCE}/{path.relative_to(ROOT).as_posix()}{'' if plain else '.md'}"


def _links(text: str) -> Iterator[re.Match[str]]:
    return (found for found in _CODE_OR_LINK.finditer(text) if found["path"])


def _target(link: str, folder: Path) -> Path | None:
    """The file of the repository behind a relative link; None if there is none."""
    path = Path(os.path.normpath(folder / link))
    return path if path.is_file() and path.is_relative_to(ROOT) else None


# ---- pages of files ----------------------------------------------------------------------------


def source_file(path: Path, config: MkDocsConfig) -> File:
    """A file of the repository as a file of the site."""
    uri = site_uri(path)
    if path.suffix in PICTURES:
        return File.generated(config, uri, abs_src_path=str(path))
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        content = rewritten(text, path.parent, uri)
    else:
        content = code_page(text, path.relative_to(ROOT).as_posix())
    return File.generated(config, uri, content=content, inclusion=InclusionLevel.NOT_IN_NAV)


def code_page(text: str, name: str) -> str:
    """A page that shows a file of code; the search leaves it out."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    language = LANGUAGES.get(Path(name).suffix, "text")
    head = f"---\nsearch:\n  exclude: true\n---\n\n# {name}\n\n"
    return f'{head}{fence}{language} title="{name}"\n{text.rstrip()}\n{fence}\n'


# ---- formulas and navigation -------------------------------------------------------------------


def math_fence(source: str, *_: object, **__: object) -> str:
    """A fence `math` with a formula of LaTeX, as MathML."""
    return f"<p>{convert(' '.join(source.split()), display='block')}</p>"


def expanded_nav(nav: Any, pages: Path) -> Any:
    """The navigation with each folder (`reference/optimizers/`) as the pages in it, sorted."""
    if isinstance(nav, list):
        return [expanded_nav(item, pages) for item in nav]
    if isinstance(nav, dict):
        return {title: expanded_nav(item, pages) for title, item in nav.items()}
    if isinstance(nav, str) and nav.endswith("/"):
        return [f"{nav}{path.name}" for path in sorted((pages / nav).glob("*.md"))]
    return nav


# ---- generated parts ---------------------------------------------------------------------------


def with_generated_parts(text: str) -> str:
    """A page's text with what its markers stand for behind them."""
    for marker, make in PARTS.items():
        if marker in text:
            text = text.replace(marker, make())
    return text


def findings() -> str:
    """A section for each script in findings/, from its head."""
    return "\n".join(map(_finding, sorted((ROOT / "findings").glob("*.sh"))))


def _finding(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()[1:]
    head = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    text = "\n".join(line.removeprefix("#").strip() for line in head)
    return f"### [{path.name}](../../../findings/{path.name})\n\n{text}\n"


def commands() -> str:
    """A section for each command: what it prints with `--help`."""
    from optfactory.bench import arguments
    from optfactory.cli import parser

    (choices,) = (a.choices for a in parser.command_line()._actions if isinstance(a.choices, dict))
    parsers = {**choices, "bench": arguments.command_line()}
    # As wide as a page, whatever the terminal of who builds.
    with mock.patch.dict(os.environ, COLUMNS="82"):
        helps = {name: parsers[name].format_help().rstrip() for name in choices}
    return "\n".join(f"## optfactory {name}\n\n```text\n{helps[name]}\n```\n" for name in helps)


PARTS: dict[str, Callable[[], str]] = {
    "<!-- findings -->": findings,
    "<!-- commands -->": commands,
    "<!-- example plan -->": example_plan.example_link,
}
