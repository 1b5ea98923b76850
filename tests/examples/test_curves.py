"""Curves of examples/sweep.py: how they are drawn, and those that the documentation shows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import mean
from types import ModuleType
from typing import Any

import pytest

from tests.examples.tools import ROOT, figures_of, run_of


def curve_of(name: str, seed: int, *losses: float) -> dict[str, Any]:
    """A run with a loss every ten steps, the first far above the unigram baseline of 3."""
    curve = [[10 * index, loss] for index, loss in enumerate((4.5, *losses))]
    return {**run_of(name, losses[-1], seed=seed), "lr": 0.002, "val_curve": curve}


RUNS = [
    *(curve_of("a", 0, 2.5, 2.25), curve_of("b", 0, 2.0, 1.5), curve_of("paged_a", 0, 2.5, 2.25)),
    *(curve_of("a", 1, 2.75, 2.0), curve_of("b", 1, 2.0, 1.75)),
]


def test_a_line_is_the_mean_of_the_seeds_and_a_band_their_range(
    comparison: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = figures_of(comparison, monkeypatch)
    comparison.plot_curves(RUNS, tmp_path / "curves.png")
    axes = kept[0].axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines) == ["a, paged_a, lr 0.002", "b, lr 0.002", "unigram baseline"]
    first, second, baseline = lines.values()
    assert list(first.get_xdata()) == [0, 10, 20]
    assert list(first.get_ydata()) == [4.5, 2.625, 2.125]
    assert list(second.get_ydata()) == [4.5, 2.0, 1.625]
    assert set(baseline.get_ydata()) == {3.0}
    bands = [{tuple(xy) for xy in band.get_paths()[0].vertices} for band in axes.collections]
    assert bands == [
        {(0, 4.5), (10, 2.5), (10, 2.75), (20, 2.0), (20, 2.25)},
        {(0, 4.5), (10, 2.0), (20, 1.5), (20, 1.75)},
    ]
    assert (axes.get_xlabel(), axes.get_ylabel()) == (
        "training step",
        "validation loss, nats a character",
    )


def test_ends_above_the_unigram_baseline_are_within_the_picture(
    comparison: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = figures_of(comparison, monkeypatch)
    comparison.plot_curves([curve_of("a", 0, 4.25, 4.0)], tmp_path / "curves.png")
    low, high = kept[0].axes[0].get_ylim()
    assert low < 3 < 4 < high < 4.5


def test_the_page_says_what_the_figures_behind_its_picture_say() -> None:
    runs = json.loads((ROOT / "examples" / "results" / "curves.json").read_text())
    page = ROOT / "docs" / "pages" / "explanation" / "training-runs.md"
    text = page.read_text(encoding="utf-8")
    words = " ".join(text.partition("(../pictures/curves.png)")[2].split())
    means: dict[str, dict[int, float]] = {}
    for name in ("adamw8bit", "muon8bit"):
        of_name = [run for run in runs if run["optimizer"] == name]
        assert [run["seed"] for run in of_name] == [0, 1, 2]
        at_steps = zip(*(run["val_curve"] for run in of_name), strict=True)
        means[name] = {points[0][0]: mean(loss for _, loss in points) for points in at_steps}
        figures = re.search(rf"`{name}`(?: is)? at ([\d.]+)[^(]*\(([\d.]+) to ([\d.]+)", words)
        assert figures is not None
        found = [run["val_loss"] for run in of_name]
        expected = (mean(found), min(found), max(found))
        assert figures.groups() == tuple(f"{figure:.3f}" for figure in expected)
    adamw, muon = means.values()
    assert all(muon[step] < adamw[step] for step in muon if step)  # at step 0 they are the same
    below = [step for step in muon if muon[step] < adamw[300]]
    assert f"`muon8bit` is below that by step {below[0]}" in words


def test_families_have_a_panel_each_and_widths_a_line(
    comparison: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = figures_of(comparison, monkeypatch)
    names = ("lion8bit", "adamw", "adamwfp8", "paged_adamw4bit", "adam16bit")
    runs = [curve_of(name, seed, 2.5, 2.0) for name in names for seed in (0, 1)]
    comparison.plot_families(runs, tmp_path / "families.png")
    panels = {axes.get_title(): axes for axes in kept[0].axes if axes.get_title()}
    found = {title: [line.get_label() for line in axes.lines] for title, axes in panels.items()}
    assert found == {
        "adam, lr 0.002": ["16bit"],
        "adamw, lr 0.002": ["32bit", "fp8", "4bit"],
        "lion, lr 0.002": ["8bit"],
    }
    (line,) = panels["lion, lr 0.002"].lines
    assert list(line.get_ydata()) == [4.5, 2.5, 2.0]
    (legend,) = kept[0].legends
    assert [text.get_text() for text in legend.get_texts()] == list(comparison.WIDTHS)
