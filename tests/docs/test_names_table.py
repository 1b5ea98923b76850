"""The script of the table of all names, in a browser."""

from __future__ import annotations

from pathlib import Path

import pytest

from docs.generate.names_page import names_page
from optfactory import list_optimizers
from tests.browser import needs_browser, probed

markdown = pytest.importorskip("markdown")  # of the extra docs
SCRIPT = Path(__file__).parents[2] / "docs" / "pages" / "assets" / "names.js"
PROBE = """
  const rows = () => [...document.querySelectorAll("tbody tr")].filter((row) => !row.hidden)
    .map((row) => row.cells[0].textContent.trim());
  const first = rows();
  const button = (text) => [...document.querySelectorAll("th button")]
    .find((found) => found.textContent === text);
  button("bytes a parameter").click();
  const rising = [...document.querySelectorAll("tbody tr")]
    .map((row) => parseFloat(row.cells[3].textContent));
  const filter = document.querySelector("input");
  const found = {};
  for (const words of ["", "paged 8 torchao", "UNPAGED fp8 muon", "nothing"]) {
    filter.value = words;
    filter.dispatchEvent(new page.Event("input"));
    found[words] = rows().sort();
  }
  return { first, rising, found, told: document.querySelector("output").textContent };
"""


def as_html(text: str) -> str:
    """The page as the site has it, without the site's frame."""
    body = markdown.markdown(text, extensions=["attr_list", "md_in_html", "tables"])
    script = SCRIPT.read_text(encoding="utf-8")
    return f"<!doctype html><html><head></head><body>{body}<script>{script}</script></body></html>"


@needs_browser
def test_rows_are_found_by_words_and_sorted_by_columns(tmp_path: Path) -> None:
    answer = probed(as_html(names_page()), PROBE, tmp_path)
    names = list_optimizers()
    assert answer["first"] == names
    assert answer["rising"] == sorted(answer["rising"])
    assert answer["found"][""] == names
    assert answer["found"]["paged 8 torchao"] == ["paged_adam8bit", "paged_adamw8bit"]
    assert answer["found"]["UNPAGED fp8 muon"] == ["muonfp8"]
    assert answer["found"]["nothing"] == []
    assert answer["told"] == f" 0 of {len(names)} names"
