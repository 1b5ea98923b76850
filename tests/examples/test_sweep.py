"""examples/sweep.py as a user runs it: two names trained, earlier figures, its table."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from tests.examples.tools import TINY, figures_of, run_of, sweep

HEADER = "| optimizer | validation loss | bytes of state a parameter |\n|---|---|---|\n"
SEEDS = HEADER.replace("validation loss", "validation loss, mean of 2 seeds (range)")
MARKED = "# Title\n\n<!-- sweep -->\nold\n<!-- /sweep -->\n\nrest\n"

pytestmark = pytest.mark.slow


RUNS = [run_of("adam"), run_of("adam8bit", 2.25, 203), run_of("paged_adam")]
TABLE = f"{HEADER}| `adam`, `paged_adam` | 2.0000 | 8.00 |\n| `adam8bit` | 2.2500 | 2.03 |\n"


def test_two_names_are_trained_and_one_with_every_seed(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 400, encoding="utf-8")
    (tmp_path / "page.md").write_text(MARKED)
    files = ("--json", "runs.json", "--plot", "runs.png", "--markdown", "page.md")
    words = ("--names", "*adamw8bit", "--seeds", "2", *files, "--", f"data={text}", *TINY)
    done = sweep(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    runs = json.loads((tmp_path / "runs.json").read_text())
    trained = [(run["seed"], run["optimizer"]) for run in runs]
    assert trained == [(0, "adamw8bit"), (0, "paged_adamw8bit"), (1, "adamw8bit")]
    keys = set(run_of("adamw8bit"))
    assert all(run.keys() == keys for run in runs)
    first, second, other = ({k: run[k] for k in keys - {"optimizer"}} for run in runs)
    assert first == second  # paging changes no bit
    assert other["val_loss"] != first["val_loss"]
    assert first["model"] == "character transformer, 1 blocks of width 64"
    assert first["device"].endswith(", 1 threads")
    assert 2 < first["state_bytes"] / first["parameters"] < 8
    ratio = first["state_bytes"] / first["parameters"]
    low, high = sorted(run["val_loss"] for run in runs[1:])
    loss = f"{(low + high) / 2:.4f} ({low:.4f} to {high:.4f})"
    row = f"| `adamw8bit`, `paged_adamw8bit` | {loss} | {ratio:.2f} |\n"
    assert done.stdout.endswith(SEEDS + row)
    assert (tmp_path / "page.md").read_text() == MARKED.replace("old", f"\n{SEEDS}{row}")
    assert (tmp_path / "runs.png").read_bytes().startswith(b"\x89PNG")
    # Nothing else is left where it ran.
    expected = {"text.txt", "page.md", "runs.json", "runs.png"}
    assert {path.name for path in tmp_path.iterdir()} == expected


def test_earlier_figures_are_shown_without_training(tmp_path: Path) -> None:
    (tmp_path / "runs.json").write_text(json.dumps(RUNS))
    (tmp_path / "page.md").write_text(MARKED)
    words = ("--from", "runs.json", "--plot", "runs.pdf", "--json", "again.json")
    done = sweep(tmp_path, *words, "--markdown", "page.md", "--names", "nothing is trained")
    assert (done.returncode, done.stdout, done.stderr) == (0, TABLE, "")
    assert json.loads((tmp_path / "again.json").read_text()) == RUNS
    assert (tmp_path / "runs.pdf").read_bytes().startswith(b"%PDF")
    assert (tmp_path / "page.md").read_text() == MARKED.replace("old", f"\n{TABLE}")


def test_a_file_without_markers_is_refused_and_unchanged(tmp_path: Path) -> None:
    (tmp_path / "runs.json").write_text(json.dumps(RUNS))
    (tmp_path / "page.md").write_text("# Title\n")
    done = sweep(tmp_path, "--from", "runs.json", "--markdown", "page.md")
    assert done.returncode != 0
    assert "page.md has no lines <!-- sweep --> and <!-- /sweep -->" in done.stderr
    assert (tmp_path / "page.md").read_text() == "# Title\n"


def test_a_sweep_needs_a_seed(tmp_path: Path) -> None:
    done = sweep(tmp_path, "--seeds", "0")
    assert done.returncode == 2
    assert "--seeds must be at least 1" in done.stderr


def test_curves_are_kept_and_drawn_where_asked_for(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 400, encoding="utf-8")
    files = ("--curves", "curves.png", "--json", "curves.json")
    chosen = ("--names", "[adamw8bit,muon8bit]", "--seeds", "1")
    done = sweep(tmp_path, *chosen, *files, "--", f"data={text}", *TINY)
    assert done.returncode == 0, done.stderr
    runs = json.loads((tmp_path / "curves.json").read_text())
    assert [(run["optimizer"], run["lr"]) for run in runs] == [
        ("adamw8bit", 0.002),
        ("muon8bit", 0.016),
    ]
    for run in runs:
        assert [step for step, _ in run["val_curve"]] == [0, 6, 12]
        assert run["val_curve"][-1][1] == run["val_loss"]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_figures_without_curves_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / "runs.json").write_text(json.dumps([run_of("adam")]))
    done = sweep(tmp_path, "--from", "runs.json", "--curves", "curves.png", "--json", "again.json")
    assert done.returncode == 2
    assert "runs.json has no curves; train with --curves to keep them" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["runs.json"]


# ---- pieces -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<!-- sweep -->\n",
        "<!-- /sweep -->\n",
        "<!-- /sweep -->\n<!-- sweep -->\n",
        "<!-- sweep --> \n<!-- /sweep -->\n",
        "<!-- bench -->\n<!-- /bench -->\n",
    ],
)
def test_both_markers_are_needed_in_order(
    text: str, comparison: ModuleType, tmp_path: Path
) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(ValueError, match=r"page\.md has no lines"):
        comparison.write_between_markers(page, "new\n")
    assert page.read_text() == text


def test_writing_twice_is_writing_once(comparison: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"é\n{MARKED}é\n", encoding="utf-8")
    texts = []
    for text in ("new\n", "newer\n", "newer\n"):
        comparison.write_between_markers(page, text)
        texts.append(page.read_text(encoding="utf-8"))
    assert texts[0] == f"é\n{MARKED}é\n".replace("old", "\nnew\n")
    assert texts[1] == texts[2] == texts[0].replace("new", "newer")


def test_names_share_a_line_only_with_the_same_loss_and_bytes(comparison: ModuleType) -> None:
    runs = [run_of("a"), run_of("b", 2.0 + 1e-15), run_of("c", state_bytes=801), run_of("d")]
    assert [names for names, _ in comparison.same_results(runs)] == [["a", "d"], ["b"], ["c"]]
    assert comparison.markdown(RUNS) == TABLE


def test_every_seed_is_a_point_and_the_title_says_what_where_and_which(
    comparison: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [run_of("a"), run_of("b", 2.5), run_of("c")]
    runs += [run_of(name, loss, seed=s) for s in (1, 2) for name, loss in (("a", 2 + s), ("b", 2))]
    kept = figures_of(comparison, monkeypatch)
    comparison.plot(runs, tmp_path / "runs.png")
    axes = kept[0].axes[0]
    points = [
        list(dots.get_offsets()[:, 1]) for dots in axes.collections if len(dots.get_offsets()) > 1
    ]
    assert points == [[2.0, 3.0, 4.0], [2.5, 2.0, 2.0]]
    assert axes.get_title().splitlines() == [
        "a model of two blocks, 0.00 M parameters, 3 seeds",
        "Abacus 2, 2 threads",
        "lowest mean loss: b",
    ]


@pytest.mark.parametrize("words", [0, 3, 12])
def test_no_text_leaves_the_picture(
    words: int, comparison: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [run_of(f"name{i}{'_of' * words}", 2 + i // 4, 100 * (i // 4 + 1)) for i in range(18)]
    runs[0]["device"] = "a processor of many words " * (words + 1)
    kept = figures_of(comparison, monkeypatch)
    comparison.plot(runs, tmp_path / "runs.png")
    box = kept[0].get_tightbbox().padded(-0.001)  # inches
    assert min(box.x0, box.y0) >= 0
    assert box.x1 <= kept[0].get_figwidth()
    assert box.y1 <= kept[0].get_figheight()


@pytest.mark.parametrize("ending", ["png", "pdf", "svg"])
def test_a_picture_of_many_names(ending: str, comparison: ModuleType, tmp_path: Path) -> None:
    runs = [run_of(f"name{i}", 2 + i // 2, 100 * (i // 2 + 1)) for i in range(18)]
    file = tmp_path / f"runs.{ending}"
    comparison.plot(runs, file)
    assert file.stat().st_size > 1000
    if ending == "svg":
        text = file.read_text()
        assert all(f"<!-- name{i}" in text for i in range(0, 18, 2))
    assert comparison.plt.get_fignums() == []
