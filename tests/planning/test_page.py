"""The page of a plan: its figures, its safety, and what it does in a browser."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import pytest
import torch
from torch import nn

from examples.plan_memory import llama
from optfactory import plan
from optfactory.cli import main
from optfactory.planning.kinds import KINDS, by_kind
from optfactory.planning.memory_plan import MemoryPlan
from optfactory.planning.text import human
from tests.browser import needs_browser, probed
from tests.planning.harness import Odd, on_meta

RULES = {"no_decay": {"ndim": "<=1", "weight_decay": 0.0}}


class Reader(HTMLParser):
    """Elements that are open, text, attributes by element."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag != "input":
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def attributes(self, tag: str, key: str) -> list[str | None]:
        return [
            attributes[key] for name, attributes in self.found if name == tag and key in attributes
        ]


@pytest.fixture(scope="module")
def seven_billion() -> MemoryPlan:
    with torch.device("meta"):
        model = llama()
    return plan(
        "paged_adamw4bit", model, device="cuda", memory="24GiB", mesh="2x4", param_groups=RULES
    )


def test_bars_show_all_bytes_of_every_name() -> None:
    planned = plan("adamw8bit", on_meta(Odd), memory="1GB", param_groups=RULES)
    reader = Reader(planned.to_html("models:odd"))
    rows = [row for tag, row in reader.found if tag == "tr" and "data-name" in row]
    assert [row["data-name"] for row in rows] == [
        x.name for x in planned.alternatives if not x.problem
    ]
    base = sum(s.nbytes for s in planned.shares if s.what not in ("state", "scratch"))
    for row, other in zip(rows, planned.alternatives, strict=True):
        assert int(row["data-state"] or 0) == other.state_bytes
        assert int(row["data-total"] or 0) == base + sum(share.nbytes for share in other.shares)
    assert [row["data-name"] for row in rows if row.get("class") == "chosen"] == ["adamw8bit"]


def test_every_kind_of_memory_that_a_plan_has_has_a_colour() -> None:
    """Bars without one of them would be too short."""
    for device in ("cpu", "cuda"):
        planned = plan("adamw", on_meta(Odd), device=device)
        for other in planned.alternatives:
            assert sum(by_kind(other.shares).values()) == sum(s.nbytes for s in other.shares)
    looks = [(kind.color, kind.striped) for kind in KINDS]
    assert len(set(looks)) == len(looks)


def test_it_says_what_the_text_says(seven_billion: MemoryPlan) -> None:
    page = seven_billion.to_html("llama")
    text = Reader(page).text
    names = [name for group in seven_billion.groups for name in group.parameters]
    assert len(names) == 291
    assert all(name in text for name in names)
    assert "differs from the optimizer in weight_decay: 0.0" in text
    assert f"of {human(24 * 2**30)} on each rank" in text
    reasons = {row.reason for row in seven_billion.report.rows} - {""}
    assert reasons
    assert "65 tensors: fewer than 100000: not paged" in text
    assert "Equal ranks together" in text
    assert "Copies on the largest rank" in text


def test_a_plan_of_seven_billion_parameters_is_below_300_kb(seven_billion: MemoryPlan) -> None:
    assert len(seven_billion.to_html("llama").encode()) < 300_000


def test_nothing_is_loaded_and_names_are_no_markup() -> None:
    label = "<script>alert(1)</script>&\"'"
    model = nn.Module()
    model.add_module("<img src=x onerror=alert(1)>", nn.Linear(8, 8, device="meta"))
    page = plan("adamw", model, param_groups={label: {"ndim": 1, "lr": 0.0}}).to_html("</title><b>")
    reader = Reader(page)
    assert [tag for tag, _ in reader.found if tag in ("img", "link", "iframe")] == []
    assert not any({"src", "onerror"} & set(keys) for _, keys in reader.found)
    ids = {f"#{key}" for _, keys in reader.found if (key := keys.get("id"))}
    assert set(reader.attributes("a", "href")) <= ids
    assert sum(tag == "script" for tag, _ in reader.found) == 1
    assert label in reader.text
    assert not re.findall(r"url\(|@import|https?:", page)


def test_headings_are_in_order_and_pictures_have_texts(seven_billion: MemoryPlan) -> None:
    reader = Reader(seven_billion.to_html("llama"))
    headings = [int(tag[1]) for tag, _ in reader.found if re.fullmatch(r"h\d", tag)]
    assert headings[0] == 1
    assert set(headings[1:]) == {2}
    pictures = [attributes for _, attributes in reader.found if attributes.get("role") == "img"]
    assert len(pictures) == 1 + sum(not other.problem for other in seven_billion.alternatives)
    assert all("parameters" in (picture["aria-label"] or "") for picture in pictures)
    assert reader.attributes("html", "lang") == ["en"]


def luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return sum(w * x for w, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    light, dark = sorted(map(luminance, (one, other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_texts_can_be_read_in_light_and_dark() -> None:
    """WCAG 2.2, criterion 1.4.3: 4.5 to 1."""
    style = resources.files("optfactory.planning.page").joinpath("page.css").read_text()
    schemes = re.findall(r":root \{(.*?)\}", style, re.S)
    assert len(schemes) == 2
    for scheme in schemes:
        colors = dict(re.findall(r"--(\w+): (#\w{6})", scheme))
        for text in ("text", "quiet", "mark", "good", "bad"):
            assert contrast(colors[text], colors["ground"]) >= 4.5, text
        assert contrast(colors["text"], colors["field"]) >= 4.5


def test_it_is_written_beside_what_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.html"
    words = ["plan", "adamw8bit", "--model", "tests.planning.harness:Odd", "--html"]
    assert main([*words, str(file)]) == 0
    assert capsys.readouterr().out.startswith("adamw8bit for")
    assert file.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert main([*words, str(file), "--names", "lion*,zzz*"]) == 1
    assert "got 'zzz*', which no optimizer matches" in capsys.readouterr().err
    assert main([*words, str(file), "--names", " lion8bit, adam8bit"]) == 0
    named = Reader(file.read_text(encoding="utf-8")).attributes("tr", "data-name")
    assert named == ["adam8bit", "adamw8bit", "lion8bit"]
    capsys.readouterr()
    for bad, told in (("plan.txt", ".html, .htm"), ("nowhere/plan.html", "no folder")):
        assert main([*words, str(tmp_path / bad)]) == 2
        assert told in capsys.readouterr().err


PROBE = """
  const table = document.getElementById("names");
  const names = () => [...table.tBodies[0].rows].filter((row) => !row.hidden)
    .map((row) => row.dataset.name);
  const button = (key) => table.querySelector(`button[data-key=${key}]`);
  const first = names();
  button("total").click();
  const rising = names();
  button("total").click();
  const falling = names();
  const sorted = button("total").closest("th").getAttribute("aria-sort");
  const filter = document.getElementById("filter");
  filter.value = "Paged muon";
  filter.dispatchEvent(new page.Event("input"));
  button("total").focus();
  return {
    first, rising, falling, sorted, filtered: names().sort(),
    told: document.getElementById("shown").textContent,
    wide: document.documentElement.scrollWidth,
    ground: page.getComputedStyle(document.body).backgroundColor,
    focused: document.activeElement.dataset.key,
    bar: document.querySelector("header .bar").getBoundingClientRect().width,
  };
"""


@needs_browser
def test_in_a_browser(seven_billion: MemoryPlan, tmp_path: Path) -> None:
    """No errors, nothing wider than a phone; sorting, filtering and the keyboard work."""
    page = seven_billion.to_html("llama")
    possible = [other for other in seven_billion.alternatives if not other.problem]
    totals = {x.name: sum(share.nbytes for share in x.shares) for x in possible}
    for width, dark in ((360, True), (1000, False)):
        found = probed(page, PROBE, tmp_path, width=width, dark=dark)
        assert found["first"] == list(totals)
        assert found["rising"] == sorted(totals, key=lambda name: (totals[name], name))
        assert found["falling"] == found["rising"][::-1]
        assert found["sorted"] == "descending"
        assert found["filtered"] == sorted(n for n in totals if n.startswith("paged_muon"))
        assert found["told"] == f"{len(found['filtered'])} of {len(totals)} names"
        assert 0.8 * width < found["bar"] < found["wide"] <= width
        assert found["ground"] == ("rgb(21, 23, 27)" if dark else "rgb(255, 255, 255)")
        assert found["focused"] == "total"


@needs_browser
def test_the_browser_tells_what_goes_wrong(tmp_path: Path) -> None:
    """Else the test above could not fail."""
    page = "<!doctype html><html><head></head><body><script>missing()</script></body></html>"
    with pytest.raises(AssertionError, match="missing is not defined"):
        probed(page, "return 1;", tmp_path)
