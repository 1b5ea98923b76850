"""`optfactory plan` as users start it: what it prints and writes, and its exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from optfactory import plan
from tests.command_line import ok, refused
from tests.planning.conftest import Factory, Run

ROOT = Path(__file__).parents[2]
MODEL = "def make():\n    return nn.Sequential(nn.Embedding(500, 300), nn.Linear(300, 400))"
RULE = "param_groups.a={match: '%s', lr_scale: 2}"


def same_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(nn.Embedding(500, 300), nn.Linear(300, 400)).to(dtype)


def test_it_prints_the_plan_that_python_gives(run: Run, factory: Factory) -> None:
    out = ok(run("paged_adam8bit", "--model", factory(MODEL)))
    assert out == f"{plan('paged_adam8bit', same_model())}\n"


def test_overrides_stand_on_either_side_of_options(run: Run, factory: Factory) -> None:
    expected = plan("adam", same_model(), lr=0.5, amsgrad=True)
    model = factory(MODEL)
    for words in (
        ("adam", "lr=0.5", "amsgrad=true", "--model", model),
        ("adam", "lr=0.5", "--model", model, "amsgrad=true"),
        ("--model", model, "adam", "lr=0.5", "amsgrad=true"),
    ):
        assert ok(run(*words)) == f"{expected}\n"


def test_json_is_all_of_the_plan(run: Run, factory: Factory) -> None:
    words = ("lamb8bit", RULE % "1.*", "--model", factory(MODEL), "--memory", "1GB", "--json")
    values = json.loads(ok(run(*words)), parse_constant=pytest.fail)
    rules = {"a": {"match": "1.*", "lr_scale": 2}}
    planned = plan("lamb8bit", same_model(), memory="1GB", param_groups=rules)
    assert values == json.loads(json.dumps(planned.as_dict()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_models_dtype_is_changed(dtype: str, run: Run, factory: Factory) -> None:
    out = ok(run("adam", "--model", factory(MODEL), "--dtype", dtype, "--json"))
    expected = plan("adam", same_model(getattr(torch, dtype))).as_dict()
    assert json.loads(out)["shares"] == expected["shares"]


def test_device_and_memory(run: Run, factory: Factory) -> None:
    words = ("paged_adamw", "--model", factory(MODEL), "--device", "cuda")
    expected = plan("paged_adamw", same_model(), device="cuda", memory="5MB")
    assert ok(run(*words, "--memory", "5MB")) == f"{expected}\n"
    stay, leave = expected.needed()
    assert "It fits: " in ok(run(*words, "--memory", stay + leave))
    assert "fits only with paged state" in ok(run(*words, "--memory", stay))
    assert "It does not fit" in ok(run(*words, "--memory", stay - 1), code=1)


def test_a_rule_that_matches_nothing_is_a_failure_that_shows_the_plan(
    run: Run, factory: Factory
) -> None:
    model = factory(MODEL)
    out = ok(run("adam", RULE % "2.*", "--model", model), code=1)
    assert "param_groups.a: matches no parameter; the parameters are 0.weight" in out
    assert "memory " in out
    values = json.loads(ok(run("adam", RULE % "2.*", "--model", model, "--json"), code=1))
    assert values["unmatched"].keys() == {"a"}
    optional = (RULE % "2.*").replace("}", ", optional: true}")
    assert "param_groups.a: matches no parameter, and is optional" in ok(
        run("adam", optional, "--model", model)
    )


def test_a_config_file_is_planned(run: Run, factory: Factory, tmp_path: Path) -> None:
    model, file = factory(MODEL), tmp_path / "app.yaml"
    file.write_text("optimizer: {name: lamb8bit, min_8bit_size: 0}\n")
    assert ok(run(file, "--model", model)) == f"{plan('lamb8bit', same_model(), min_8bit_size=0)}\n"


# ---- refusals, each before any work -----------------------------------------------------------

NEVER = "raise SystemError('the model was made')"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("adm8bit",), "Did you mean 'adam8bit'"),
        (("adam8bit", "lrr=1"), "did you mean 'lr'"),
        (("adam8bit", "amsgrad=true"), "amsgrad needs 32-bit state"),
        (("adam", "--memory", "12XB"), "memory is a size such as '24GiB'"),
        (("adam", "--memory", "0"), "memory is a size"),
        (("adam", "--memory=-1"), "memory is a size"),
    ],
)
def test_a_bad_config_or_size_is_refused_before_the_model_is_made(
    words: tuple[str, ...], message: str, run: Run, factory: Factory
) -> None:
    assert message in refused(run(*words, "--model", factory(NEVER)))


@pytest.mark.parametrize("name", ["plan.jpg", "plan", "plan.png.txt", ".png", ""])
def test_a_picture_of_another_kind_is_refused_before_any_work(
    name: str, run: Run, factory: Factory, tmp_path: Path
) -> None:
    err = refused(run("adam", "--model", factory(NEVER), "--plot", name), code=2)
    assert ".png, .pdf, .svg" in err
    assert not (tmp_path / name).is_file()


def test_without_matplotlib_a_picture_is_refused_before_any_work(
    run: Run, factory: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    words = ("adam", "--model", factory(NEVER), "--plot", "plan.png")
    assert "pip install matplotlib" in refused(run(*words), code=2)


@pytest.mark.parametrize(
    "words",
    [
        ("adam",),
        ("--model", "torch.nn:ReLU"),
        ("adam", "--model", "torch.nn:ReLU", "--dtype", "float64"),
        ("adam", "--model", "torch.nn:ReLU", "--dtpye", "float32"),
        ("adam", "lr", "--model", "torch.nn:ReLU"),
        ("no/such.yaml", "--model", "torch.nn:ReLU"),
    ],
)
def test_wrong_usage_exits_with_2(words: tuple[str, ...], run: Run) -> None:
    assert refused(run(*words), code=2)


def test_errors_are_json_when_asked(run: Run, factory: Factory) -> None:
    err = refused(run("adam", "--model", factory("make = 3"), "--json"))
    assert json.loads(err)["error"]["type"] == "ConfigError"


# ---- pictures ---------------------------------------------------------------------------------

KINDS = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}


@pytest.mark.parametrize(("kind", "magic"), KINDS.items())
def test_pictures_are_written(
    kind: str, magic: bytes, run: Run, factory: Factory, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / f"plan.{kind}"
    words = ("paged_adam", "amsgrad=true", "--model", factory(MODEL), "--memory", "5MB")
    expected = plan("paged_adam", same_model(), memory="5MB", amsgrad=True)
    assert ok(run(*words, "--plot", file)) == f"{expected}\n"
    assert file.read_bytes().startswith(magic)
    if kind == "svg":
        text = file.read_text()
        assert text.count("adamw8bit") == 0  # it cannot have amsgrad
        for label in ("paged_lamb32bit", "available", "paged 32-bit state", "GiB"):
            assert f"<!-- {label}" in text


def test_it_runs_as_a_program_in_the_folder_of_the_model(factory: Factory, tmp_path: Path) -> None:
    model = factory(MODEL)
    command = [sys.executable, "-m", "optfactory", "plan", "adam", "--model", model, "--json"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == json.loads(json.dumps(plan("adam", same_model()).as_dict()))
