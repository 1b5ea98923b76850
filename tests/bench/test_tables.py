"""What tables say, on the screen, in markdown, in the documentation, and in the picture."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from optfactory.bench import markdown, plot
from optfactory.bench.grids import all_grids, heading, number, time_grids
from optfactory.bench.results import Absent, Figures, read_json
from optfactory.bench.show import progress, show
from optfactory.errors import ConfigError
from tests.bench.harness import ROW, every_kind, make_figures, row

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "pages" / "explanation" / "speed.md"
RECORDED = ROOT / "examples" / "results" / "readme.json"


# ---- text -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.704, "0.70"), (9.99, "9.99"), (23.04, "23.0"), (141.2, "141"), (1757.0, "1,757")],
)
def test_numbers_have_three_digits(value, text):
    assert number(value) == text
    assert number(None) == ""


def test_the_heading_names_machine_threads_bandwidth_and_versions():
    assert heading(make_figures()) == (
        "Abacus 2, 2 threads, 40.0 GB/s (a = a*s + b), torch 2.13.0, optfactory 0.1.0"
    )


def test_a_table_of_times():
    large, small = time_grids(every_kind())
    assert large.title == "large: one tensor of 33.5 M elements, float32"
    assert large.headings == (
        *("optimizer", "ms/step", "ns/param", "x limit", "x fused", "best", "state B/param"),
    )
    assert large.lines[1] == (
        "adamw8bit",
        *("0.70", "0.70", "1.75", "1.00", "1.00"),
        "2.03",
    )
    assert [line[0] for line in large.lines] == [
        *("torch AdamW fused", "adamw8bit", "torchao AdamW8bit")
    ]
    assert large.remarks == ("timm Lamb: not installed",)
    assert small.remarks == ("timm Lamb: not installed", "torchao AdamW4bit: RuntimeError: no")


def test_a_gpus_table_has_the_hosts_time_and_allocations():
    (grid,) = time_grids(make_figures(row("adamw", host_ms=1.5, extra_mib=0.25)))
    assert grid.headings[-3:] == ("moved B/param", "host ms", "MiB in step")
    assert grid.lines[0][-3:] == ("28.0", "1.50", "0.25")


def test_a_busy_machine_is_told():
    calm = make_figures(row("adamw", fused_ms=1.2, best_fused_ms=1.0))
    busy = make_figures(ROW, row("adamw", fused_ms=1.5, best_fused_ms=1.0, unsteady=True))
    assert time_grids(calm)[0].remarks == ()
    assert time_grids(busy)[0].lines[1][4] == "1.00?"
    assert "varied 1.5-fold" in time_grids(busy)[0].remarks[0]


def test_a_case_without_room_is_a_table_without_lines():
    (grid,) = time_grids(make_figures(absent=[Absent("all", "no room", "llama7b", "float32")]))
    assert grid.title == "llama7b: Llama 7B, float32"
    assert (grid.lines, grid.remarks) == ((), ("all: no room",))


def test_tables_of_memory_and_start():
    memory, startup = all_grids(every_kind())[2:]
    assert memory.lines == (("large", "float32", "adamw8bit", "1.25", "0.03"),)
    # overhead: 0.25 + 0.01 + 1.5 - 0.02
    assert startup.lines == (("adamw8bit", "cold", "0.25", "0.01", "1.50", "0.02", "1.74"),)
    for grid in all_grids(every_kind()):
        assert all(len(line) == len(grid.headings) for line in grid.lines)


# ---- markdown ---------------------------------------------------------------------------------

EXPECTED = """\
Abacus 2, 2 threads, 40.0 GB/s (a = a*s + b), torch 2.13.0, optfactory 0.1.0

**large: one tensor of 33.5 M elements, float32**

| optimizer | ms/step | ns/param | x limit | x fused | best | state B/param |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |
| torch AdamW fused | 0.70 | 0.70 | 1.00 | 1.00 | 1.00 | 8.00 |

timm Lamb: not installed
"""


def simple():
    return make_figures(ROW, absent=[Absent("timm Lamb", "not installed")])


def test_the_markdown():
    assert markdown.render(simple()) == EXPECTED


def test_only_what_is_between_the_markers_changes(tmp_path):
    file = tmp_path / "page.md"
    file.write_text(f"# Speed\n\n{markdown.BEGIN}\nold\n{markdown.END}\n\nEnd.\n")
    assert markdown.holds_markers(file)
    for _ in range(2):
        markdown.write(file, simple())
        assert file.read_text() == (
            f"# Speed\n\n{markdown.BEGIN}\n\n{EXPECTED}\n{markdown.END}\n\nEnd.\n"
        )


def test_a_new_file_gets_the_markers(tmp_path):
    file = tmp_path / "page.md"
    assert markdown.holds_markers(file)
    markdown.write(file, simple())
    assert file.read_text() == f"{markdown.BEGIN}\n\n{EXPECTED}\n{markdown.END}\n"


@pytest.mark.parametrize(
    "text", ["", "# Speed\n", markdown.BEGIN, f"{markdown.END}\n{markdown.BEGIN}\n"]
)
def test_a_file_without_a_place_is_noticed(tmp_path, text):
    file = tmp_path / "page.md"
    file.write_text(text)
    assert not markdown.holds_markers(file)


def test_the_pages_tables_are_what_the_command_wrote():
    assert markdown.holds_markers(PAGE)
    if RECORDED.exists():  # the run whose tables the page shows
        block = PAGE.read_text(encoding="utf-8").partition(markdown.BEGIN)[2]
        assert block.partition(markdown.END)[0].strip() == (
            markdown.render(read_json(RECORDED)).strip()
        )


# ---- screen -----------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", ["40", "200"])
def test_tables_on_the_screen_are_not_cut(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    for grid in all_grids(every_kind()):
        show(grid)
        out, err = capsys.readouterr()
        assert err == ""
        assert all(word in out for heading in grid.headings for word in heading.split())
        assert all(text in out for text in (grid.title, *grid.remarks, *sum(grid.lines, ())))


def test_square_brackets_of_an_error_are_shown_as_they_are(capsys):
    absent = [Absent("timm Lamb", "ValueError: [bold]shape [3]")]
    show(time_grids(make_figures(ROW, absent=absent))[0])
    assert "timm Lamb: ValueError: [bold]shape [3]" in capsys.readouterr().out


def test_progress_leaves_stdout_alone(capsys):
    with progress("large float32", 2) as tick:
        for label in ("adamw", "lamb"):
            for done in (0.0, 0.5, 1.0):
                tick(label, done)
    assert capsys.readouterr().out == ""


def test_progress_draws_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with progress("large float32", 1) as tick:
        tick("adamw", 0.0)
    out, err = capsys.readouterr()
    assert out == ""
    assert "large float32 adamw" in err


# ---- picture ----------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Figure:
    """The picture of `every_kind`, before it becomes pixels."""
    return picture_of(every_kind(), monkeypatch, tmp_path)


def picture_of(figures: Figures, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Figure:
    kept: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (kept.append(self), save(self, *a, **k))
    )
    plot.plot(figures, tmp_path / "figures.png")
    return kept[0]


def test_the_picture_is_a_png_of_a_printable_size(tmp_path):
    file = tmp_path / "figures.png"
    plot.plot(every_kind(), file)
    data = file.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width = int.from_bytes(data[16:20], "big")
    assert width == round(7.2 * 300)


def test_other_formats_follow_from_the_name(tmp_path):
    plot.plot(every_kind(), tmp_path / "figures.svg")
    text = (tmp_path / "figures.svg").read_text()
    assert "<svg" in text
    assert "Abacus 2" in text


def test_a_panel_for_each_case_with_a_line_for_each_optimizer(drawn):
    titles = [panel.get_title() for panel in drawn.axes]
    assert titles == ["one tensor of 33.5 M elements\nfloat32", "1000 tensors of 64\nfloat32"]
    labels = [text.get_text() for text in drawn.axes[0].get_yticklabels()]
    assert labels == ["torch AdamW fused", "adamw8bit", "torchao AdamW8bit", "lamb"]
    assert len(drawn.axes[0].patches) == 3
    assert len(drawn.axes[1].patches) == 1


def test_bars_are_as_long_as_the_times_and_marked_with_the_limit(drawn):
    fused, ours, _ = drawn.axes[0].patches
    assert fused.get_width() == ours.get_width() == pytest.approx(0.7)
    marks = [line.get_paths()[0].vertices[:, 0] for line in drawn.axes[0].collections]
    assert marks[0] == pytest.approx([0.7, 0.7])
    assert marks[1] == pytest.approx([0.4, 0.4])  # 0.7 ns at 1.75 times the limit


def test_a_panel_with_a_bar_that_would_dwarf_the_others_is_logarithmic(drawn):
    panel, other = drawn.axes
    assert panel.patches[2].get_width() == pytest.approx(23.0)
    assert panel.get_xlim()[0] < 0.4  # the least limit
    assert [text.get_text().strip() for text in panel.texts] == ["0.70", "0.70", "23.0"]
    assert (panel.get_xscale(), other.get_xscale()) == ("log", "linear")
    assert panel.get_xlabel() == "ns/param and step (log)"


LONG = "the_optimizer_of_another_package_with_a_name_of_many_words"


@pytest.mark.parametrize("name", ["a", "bitsandbytes AdamW8bit", LONG, LONG.replace("_", "")])
@pytest.mark.parametrize("slowest", [0.9, 5.0, 23.0, 4000.0])
def test_no_text_or_bar_leaves_the_picture(name, slowest, monkeypatch, tmp_path):
    rows = [
        row(optimizer, case=case, text=text, ns_per_param=ns, times_limit=2.0)
        for case, text in (("a", "one"), ("b", "tensors of 64 and 128 " * 3), ("c", "GPT-2"))
        for optimizer, ns in (("torch AdamW fused", 0.7), (name, slowest))
    ]
    figures = make_figures(*rows)
    figures.machine["device"] = "A processor with a name of very many words, " * 6
    figure = picture_of(figures, monkeypatch, tmp_path)
    everything = figure.get_tightbbox().padded(-0.001)  # inches
    assert min(everything.x0, everything.y0) >= 0
    assert everything.x1 <= 7.2
    assert everything.y1 <= figure.get_figheight()
    for panel in figure.axes:
        end = panel.get_window_extent().x1 + 1
        assert all(item.get_window_extent().x1 <= end for item in (*panel.patches, *panel.texts))
    titles = [panel.title.get_window_extent() for panel in figure.axes]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(titles, 2))


def test_the_legend_names_libraries_and_limit(drawn):
    (legend,) = drawn.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        *("torch", "optfactory", "torchao", "memory-bandwidth limit")
    ]


def test_many_cases_take_several_rows(tmp_path):
    rows = [
        row("torch AdamW fused", "torch", case=case, dtype=dtype)
        for case in ("large", "small")
        for dtype in ("float32", "float16")
    ]
    plot.plot(make_figures(*rows), tmp_path / "figures.png")
    assert (tmp_path / "figures.png").stat().st_size > 0


def test_without_step_times_there_is_nothing_to_draw(tmp_path):
    with pytest.raises(ConfigError, match="no step times to draw"):
        plot.plot(make_figures(), tmp_path / "figures.png")
