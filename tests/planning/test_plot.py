"""The picture of a plan: what its title says, and that nothing is cut off."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from optfactory import plan
from optfactory.planning.memory_plan import MemoryPlan
from tests.planning.harness import Odd, on_meta

pytest.importorskip("matplotlib")
from matplotlib.figure import Figure

from optfactory.planning.plot import plot


def drawn(planned: MemoryPlan, model: str, monkeypatch: pytest.MonkeyPatch, to: Path) -> Figure:
    kept: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (kept.append(self), save(self, *a, **k))
    )
    plot(planned, to / "plan.png", model)
    return kept[0]


def test_the_title_says_model_device_and_optimizer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    planned = plan("paged_adamw8bit", on_meta(Odd), device="cuda")
    figure = drawn(planned, "models:odd", monkeypatch, tmp_path)
    first, second = figure.get_suptitle().splitlines()
    assert first == "models:odd on cuda"
    assert second == str(planned).splitlines()[0]
    assert second.startswith("paged_adamw8bit for ")
    bold = [x.get_text() for x in figure.axes[0].get_yticklabels() if x.get_fontweight() == "bold"]
    assert bold == ["paged_adamw8bit"]


@pytest.mark.parametrize("memory", [None, "1MB", "3MB", "1GB"])
@pytest.mark.parametrize("length", [1, 40, 90])
def test_no_text_leaves_the_picture(
    length: int, memory: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    planned = plan("adam8bit", on_meta(Odd), memory=memory)
    others = tuple(
        replace(other, name=f"{other.name}{'_w' * (length // 2)}") for other in planned.alternatives
    )
    planned = replace(planned, alternatives=others)
    figure = drawn(planned, "a.long.module:" * 2 * length, monkeypatch, tmp_path)
    box = figure.get_tightbbox().padded(-0.001)  # inches
    assert min(box.x0, box.y0) >= 0
    assert box.x1 <= figure.get_figwidth()
    assert box.y1 <= figure.get_figheight()
