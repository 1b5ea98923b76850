"""The page about `explain`: its commands run and print what it says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.command_line import Run

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "pages" / "how-to" / "explain.md").read_text(encoding="utf-8")
EXAMPLE = re.compile(
    r"<!-- run -->\n```bash\n(.*?)\n```\n\n<!-- printed -->\n```text\n(.*?)\n```", re.S
)
EXAMPLES = EXAMPLE.findall(PAGE)


@pytest.mark.parametrize("number", range(3))
def test_an_example_prints_what_the_page_shows(
    number: int, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(EXAMPLES) == PAGE.count("<!-- run -->") == 3
    monkeypatch.chdir(ROOT)
    command, shown = EXAMPLES[number]
    words = shlex.split(command)
    assert words[:2] == ["optfactory", "explain"]
    code, out, err = run(*words[2:])
    assert (code, err) == (0, "")
    parts = [part.strip("\n") for part in re.split(r"^\.\.\.$", shown, flags=re.M)]
    places = [out.find(part) for part in parts]
    assert places == sorted(places)
    assert min(places) >= 0
