"""`--plot`: learning rates as a picture, and where there is nothing to draw or to write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from optfactory import explain
from tests.command_line import Run, runner
from tests.explaining.conftest import TINY
from tests.explaining.test_command import COSINE, RULE, ok, on_meta, refused

KINDS = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}


@pytest.mark.parametrize("command", ["explain", "plan"])
def test_where_nothing_can_be_written_no_picture_is(
    command: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "rates.png"
    file.mkdir()
    words = COSINE if command == "explain" else ("--names", "adam")
    code, _, err = runner(capsys, command)("adam", "--model", TINY, "--plot", file, *words)
    assert (code, err.count("\n")) == (2, 1)
    assert f"cannot write {file}: " in err


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_are_written(kind: str, run: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / f"rates.{kind}"
    ok(run("adamw", RULE, "--model", TINY, *COSINE, "--plot", file))
    assert file.read_bytes().startswith(KINDS[kind])


def drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, told: Any, model: str = "") -> Any:
    """The figure of an explanation, as it is saved."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    from optfactory.explaining.plot import plot

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **more: figures.append(self))
    plot(told, tmp_path / "x.png", model)
    return figures[0]


@pytest.mark.parametrize("scale", [2, 100])
def test_a_line_for_each_curve_with_its_groups(
    scale: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rules = {"head": {"match": "head.*", "lr_scale": scale}, "decay": {"ndim": 1, "eps": 1e-7}}
    node = {"_target_": "CosineAnnealingLR", "T_max": 5000}
    told = explain("adamw", on_meta(), param_groups=rules, scheduler=node)
    figure = drawn(monkeypatch, tmp_path, told, "my:model")
    (axes,) = figure.axes
    labels = [line.get_label() for line in axes.get_lines()]
    assert labels == ["default, decay", "head, head+decay"]
    looks = {(line.get_color(), line.get_linestyle()) for line in axes.get_lines()}
    assert len({color for color, _ in looks}) == len({style for _, style in looks}) == 2
    assert axes.get_yscale() == ("log" if scale > 10 else "linear")
    assert told.schedule is not None
    for line, curve in zip(axes.get_lines(), told.schedule.rates, strict=True):
        steps, values = line.get_data()
        assert len(steps) < 5000
        assert list(values) == [curve.values[step] for step in steps]
    assert axes.get_xlabel() == "step (calls of scheduler.step())"
    assert axes.get_ylabel().startswith("learning rate")
    title = "adamw for my:model\nCosineAnnealingLR(T_max=5000)"
    assert figure.get_suptitle() == title


def test_many_curves_have_a_short_legend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from tests.param_groups.harness import Net

    rules = {"deep": {"layer_decay": 0.9}}
    told = explain("adamw", Net(depth=28), param_groups=rules, scheduler="LinearLR")
    assert told.schedule is not None
    assert len(told.schedule.rates) == 30
    figure = drawn(monkeypatch, tmp_path, told)
    assert len(figure.axes[0].get_lines()) == 30
    assert len(figure.legends[0].get_texts()) == 12
    assert "(14 more; --json has all)" in str(told)


def test_very_many_curves_are_a_band(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    groups = [{"params": [torch.zeros(2, 2)], "lr": 0.1 + i} for i in range(31)]
    node = {"_target_": "CosineAnnealingLR", "T_max": 100}
    told = explain("adamw", groups, scheduler=node)
    figure = drawn(monkeypatch, tmp_path, told)
    (axes,) = figure.axes
    assert [line.get_label() for line in axes.get_lines()] == [
        "largest: 30",
        "median: 15",
        "least: 0",
    ]
    (band,) = axes.collections
    assert band.get_label() == "between all 31"
    assert told.schedule is not None
    rates = told.schedule.rates
    corners = {tuple(point) for point in band.get_paths()[0].vertices.tolist()}
    assert {(50.0, rates[0].values[50]), (50.0, rates[30].values[50])} <= corners
    assert len(figure.legends[0].get_texts()) == 4


def test_what_is_not_finite_is_no_part_of_a_picture(
    run: Run, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "rates.svg"
    words = ("adam", "--scheduler", "ExponentialLR", "--plot", file, "--steps", 400)
    for gamma in ("10", ".nan", ".inf"):
        out = ok(run(*words, "--scheduler-arg", f"gamma={gamma}"), code=1)
        assert "problem: the learning rate of all parameters is" in out
        assert file.stat().st_size
        file.unlink()
    assert not list(recwarn)


def test_without_a_finite_rate_there_is_no_picture(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "rates.png"
    words = ("--scheduler", "tests.explaining.models.lost", "--plot", file)
    message = refused(run("adam", *words), code=2)
    assert "nothing to draw: the learning rate of all parameters is nan from step 0 on" in message
    assert not file.exists()
