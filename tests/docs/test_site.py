"""The hooks of the site: links, pages of files, formulas, navigation, generated parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("mkdocs", reason="of the extra docs")
pytest.importorskip("latex2mathml", reason="of the extra docs")

import optfactory
from docs import docstrings, hooks
from docs.hooks import PAGES, ROOT

HOW_TO = PAGES / "how-to"


def rewritten(text: str) -> str:
    return hooks.rewritten(text, HOW_TO, "how-to/page.md")


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        ("../../../examples/fsdp2.py", "../source/examples/fsdp2.py.md"),
        ("../../../CONTRIBUTING.md#the-house", "../source/CONTRIBUTING.md#the-house"),
        ("muon.md", "muon.md"),
        ("../explanation/names.md#the-rules", "../explanation/names.md#the-rules"),
        ("../pictures/sweep.png", "../pictures/sweep.png"),
        ("https://arxiv.org/abs/1412.6980", "https://arxiv.org/abs/1412.6980"),
        ("#here", "#here"),
    ],
)
def test_links_lead_to_pages_of_files(link: str, expected: str) -> None:
    assert rewritten(f"see [a `b`]({link}), and") == f"see [a `b`]({expected}), and"


def test_a_link_to_nothing_stays_and_fails_the_build() -> None:
    for link in ("../../../examples/gone.py", "../../../../outside.md"):
        assert rewritten(f"[a]({link})") == f"[a]({link})"


def test_code_has_no_links() -> None:
    fence = "```python\nx = [a](muon.md)\n[b](../../../examples/fsdp2.py)\n```\n"
    code = f"{fence}`[c](../../../README.md)`"
    assert rewritten(code) == code
    assert hooks.linked(code, HOW_TO) == []


def test_files_are_found_by_their_links_and_pages_are_none() -> None:
    text = "[a](../../../examples/fsdp2.py#x) [b](muon.md) ![c](../pictures/sweep.png)"
    assert hooks.linked(text, HOW_TO) == [ROOT / "examples" / "fsdp2.py"]


def test_markdown_of_the_repository_links_back_into_the_pages() -> None:
    text = hooks.rewritten("[a](docs/pages/index.md)", ROOT, "source/README.md")
    assert text == "[a](../index.md)"


def test_a_page_of_code_has_a_title_and_a_fence_that_holds_it() -> None:
    page = hooks.code_page('"""A ```` fence."""\n', "examples/a.py")
    assert "# examples/a.py\n" in page
    assert page.endswith('`````python title="examples/a.py"\n"""A ```` fence."""\n`````\n')
    assert "exclude: true" in page
    assert hooks.code_page("x", "a.cuh").splitlines()[-3] == '```cuda title="a.cuh"'


def test_formulas_become_mathml() -> None:
    html = hooks.math_fence("m \\leftarrow\n  \\frac{1}{2}", "math", "math", {}, None)
    assert html.count("<math") == 1
    assert 'display="block"' in html
    assert "<mfrac>" in html


def test_every_formula_of_the_pages_is_understood() -> None:
    for page in PAGES.rglob("*.md"):
        for part in page.read_text(encoding="utf-8").split("```math\n")[1:]:
            html = hooks.math_fence(part.partition("```")[0])
            assert "\\" not in html, page


def test_folders_of_the_navigation_become_their_pages(tmp_path: Path) -> None:
    folder = tmp_path / "reference" / "optimizers"
    folder.mkdir(parents=True)
    for name in ("lion", "adam"):
        (folder / f"{name}.md").write_text("# x\n")
    nav: Any = [{"Home": "index.md"}, {"Reference": [{"Optimizers": "reference/optimizers/"}]}]
    assert hooks.expanded_nav(nav, tmp_path) == [
        {"Home": "index.md"},
        {
            "Reference": [
                {"Optimizers": ["reference/optimizers/adam.md", "reference/optimizers/lion.md"]}
            ]
        },
    ]


def test_findings_are_listed_with_their_heads() -> None:
    text = hooks.with_generated_parts("# Findings\n\n<!-- findings -->\n")
    for path in (ROOT / "findings").glob("*.sh"):
        assert f"### [{path.name}](../../../findings/{path.name})\n" in text
        second = path.read_text(encoding="utf-8").splitlines()[1].removeprefix("# ")
        assert second in text
    assert "set -euo" not in text


def test_commands_are_listed_with_their_help() -> None:
    text = hooks.with_generated_parts("<!-- commands -->")
    for command in (
        "list",
        "show",
        "check",
        "copy",
        "schema",
        "configs",
        "plan",
        "doctor",
        "bench",
    ):
        assert f"## optfactory {command}\n" in text
        assert f"usage: optfactory {command} " in text
    assert max(map(len, text.splitlines())) <= 100


def test_all_that_the_package_offers_is_on_the_page_of_python() -> None:
    text = (ROOT / "docs" / "pages" / "reference" / "python.md").read_text(encoding="utf-8")
    shown = {
        line.removeprefix("::: optfactory.") for line in text.splitlines() if line[:3] == ":::"
    }
    assert set(optfactory.__all__) - shown == {"__version__"}


def test_snippets_of_docstrings_become_code() -> None:
    text = "Says.\n\n>>> a = 1\n>>> a\n1\n\nArgs:\n    a: b."
    expected = "Says.\n\n```pycon\n>>> a = 1\n>>> a\n1\n```\n\nArgs:\n    a: b."
    assert docstrings.fenced(text) == expected


def test_nothing_is_fetched_when_a_page_is_looked_at() -> None:
    text = (ROOT / "docs" / "mkdocs.yml").read_text(encoding="utf-8")
    config = yaml.load(
        text.replace("!!python/object/apply:pymdownx.slugs.slugify", ""), yaml.SafeLoader
    )
    assert config["theme"]["font"] is False
    scripts = [script["path"] for script in config["extra_javascript"]]
    assert all(
        (ROOT / "docs" / "pages" / path).is_file() for path in [*config["extra_css"], *scripts]
    )
