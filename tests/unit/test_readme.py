"""Every snippet of the README and of the documentation runs, and prints what the page says.

A note before a fence says what it is, see NOTES; Python without one runs, in the page's order.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from optfactory import list_optimizers, resolve
from optfactory.cli import main

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "pages"
BLOCK = re.compile(
    r"(?:^<!-- (?P<note>[^\n]*) -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.S | re.M
)
NOTES = {
    "output",  # what the page has printed last
    "printed",  # parts of what the lines before have printed: tests/explaining
    "run",  # lines of `optfactory`
    "run in the folder of app.py",
    "excerpt",  # of the package's code
    "by hand",  # installs something, or needs what no test has
    "under torchrun",  # as examples/fsdp2.py, which tests/examples runs
    "main job",  # run by CI itself
    "test command",
}
# Not: what `file: NAME` writes, and snippets that want a framework, `needs NAME`.
WITHOUT_NOTE = {"math", "python", "yaml"}
APP = PAGES / "how-to" / "hydra.md"


@dataclass
class Snippet:
    page: Path
    note: str
    language: str
    text: str


def snippets_of(page: Path) -> list[Snippet]:
    return [
        Snippet(page, match["note"] or "", match["language"], match["text"])
        for match in BLOCK.finditer(page.read_text(encoding="utf-8"))
    ]


DOCUMENTS = {
    page.relative_to(ROOT).as_posix(): snippets_of(page)
    for page in [ROOT / "README.md", *sorted(PAGES.rglob("*.md"))]
}
SNIPPETS = [snippet for snippets in DOCUMENTS.values() for snippet in snippets]


def noted(prefix: str, page: Path | None = None) -> list[Snippet]:
    found = (snippet for snippet in SNIPPETS if snippet.note.startswith(prefix))
    return [snippet for snippet in found if page in (None, snippet.page)]


def test_every_snippet_is_of_a_kind_that_a_test_runs() -> None:
    strange = [
        f"{snippet.page.name}: {snippet.note or snippet.language}"
        for snippet in SNIPPETS
        if snippet.note not in NOTES
        and not snippet.note.startswith(("file: ", "needs "))
        and (snippet.note or snippet.language not in WITHOUT_NOTE)
    ]
    assert not strange
    files = {(snippet.page, snippet.note) for snippet in noted("file: ")}
    assert files == {(APP, f"file: {name}") for name in ("app.py", "conf/config.yaml")}


def test_python_snippets_run_in_order_and_print_what_their_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for document, snippets in DOCUMENTS.items():
        printed = io.StringIO()
        names: dict[str, object] = {"__name__": document}
        for snippet in snippets:
            if snippet.note == "output":
                assert printed.getvalue().endswith(snippet.text), (
                    f"{document}: {printed.getvalue()}"
                )
            elif snippet.language == "python" and not snippet.note:
                with contextlib.redirect_stdout(printed):
                    exec(compile(snippet.text, document, "exec"), names)


def test_python_snippets_that_are_not_run_can_be_read() -> None:
    for snippet in [*noted("needs "), *noted("under torchrun")]:
        compile(snippet.text, snippet.page.name, "exec")


def test_yaml_snippets_are_configs() -> None:
    for snippet in SNIPPETS:
        if snippet.language == "yaml":
            config = yaml.safe_load(snippet.text)
            if "name" in config.get("optimizer", {}):
                resolve(config["optimizer"])


@pytest.mark.parametrize(
    "line", [line for s in noted("run") if s.note == "run" for line in s.text.splitlines()]
)
def test_command_lines_run(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    command, *arguments = shlex.split(line)
    assert command == "optfactory"
    assert main(arguments) == 0
    assert capsys.readouterr().out


def test_the_hydra_app_runs(tmp_path: Path) -> None:
    for snippet in noted("file: "):
        target = tmp_path / snippet.note.removeprefix("file: ")
        target.parent.mkdir(exist_ok=True)
        target.write_text(snippet.text)
    plugins = tmp_path / "site" / "hydra_plugins"
    plugins.mkdir(parents=True)
    # As the wheel installs it; the tests may run uninstalled.
    (plugins / "optfactory").symlink_to(ROOT / "optfactory" / "_hydra_plugin")
    path = os.pathsep.join([str(ROOT), str(plugins.parent)])
    (commands,) = noted("run in the folder of app.py")
    for line in commands.text.splitlines():
        command, *arguments = shlex.split(line)
        assert command == "python"
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        printed = re.findall(r"^(\w+) ([\w+]+) [\d.]+ [\d.]+$", done.stdout, re.M)
        rules = {group for _, groups in printed for group in groups.split("+")}
        assert rules == {"default", "head", "no_decay"} - {
            word[1:].split(".")[-1] for word in arguments if word[0] == "~"
        }
        names = list_optimizers("adam*8bit") if "--multirun" in arguments else ["one"]
        assert len({name for name, _ in printed}) == len(names)


def test_every_environment_variable_of_the_package_is_in_the_reference() -> None:
    read = set()
    for path in (ROOT / "optfactory").rglob("*.py"):
        read |= set(re.findall(r"\bOPTFACTORY_[A-Z_]+\b", path.read_text(encoding="utf-8")))
    page = (PAGES / "reference" / "environment.md").read_text(encoding="utf-8")
    assert read
    assert not [name for name in sorted(read) if f"| `{name}` |" not in page]


# ---- the shape of pages ------------------------------------------------------------------------


def prose(page: Path) -> Iterator[str]:
    """The lines of a page outside of fences."""
    inside = False
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.lstrip().startswith("```"):
            inside = not inside
        elif not inside:
            yield line


def test_headings_are_in_order() -> None:
    for page in [ROOT / "README.md", *PAGES.rglob("*.md")]:
        levels = [len(found[0]) for line in prose(page) if (found := re.match(r"#+(?= )", line))]
        assert levels[0] == 1, page
        assert levels.count(1) == 1, page
        steps = itertools.pairwise(levels)
        assert all(after <= before + 1 for before, after in steps), page


def test_pictures_say_what_they_show() -> None:
    for page in PAGES.rglob("*.md"):
        for words in re.findall(r"!\[(.*?)\]\(", "\n".join(prose(page))):
            assert len(words) > 20, page
