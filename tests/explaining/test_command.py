"""`optfactory explain` as users start it: what it prints and writes, and its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from optfactory import explain
from tests.command_line import Run, ok, refused
from tests.explaining.conftest import TINY, Write
from tests.explaining.models import tiny

RULE = "param_groups.head={match: head.*, lr_scale: 10}"
RULES = {"head": {"match": "head.*", "lr_scale": 10}}
COSINE = ("--scheduler", "CosineAnnealingLR", "--scheduler-arg", "T_max=100")


def on_meta(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    with torch.device("meta"):
        return tiny().to(dtype)


def from_groups_on(text: str) -> str:
    """The part of the text that does not tell what the config was read from."""
    return text[text.index("\ngroup ") :].rstrip("\n")


def test_it_prints_what_python_gives(run: Run) -> None:
    out = ok(run("paged_adamw8bit", RULE, "--model", TINY, *COSINE))
    node = {"_target_": "CosineAnnealingLR", "T_max": 100}
    expected = explain("paged_adamw8bit", on_meta(), param_groups=RULES, scheduler=node)
    assert from_groups_on(out) == from_groups_on(str(expected))


def test_json_has_all_but_every_step(run: Run) -> None:
    out = ok(run("lamb8bit", RULE, "--model", TINY, *COSINE, "--json"))
    values = json.loads(out, parse_constant=pytest.fail)
    node = {"_target_": "CosineAnnealingLR", "T_max": 100}
    told = explain("lamb8bit", on_meta(), param_groups=RULES, scheduler=node)
    expected = json.loads(json.dumps(told.as_dict()))
    for part in ("config", "groups", "scheduler", "warnings", "problems"):
        assert values[part] == expected[part]
    head = values["scheduler"]["rates"][1]
    assert (head["groups"], head["configured"]) == (["head"], [0.01])
    assert head["at"].keys() == {"0", "50", "99"}
    assert head["max"] == {"value": 0.01, "step": 0}
    rate = values["groups"][1]["rate"]
    assert rate["factors"][0]["label"] == "head"
    assert (rate["base"], rate["value"]) == (0.001, 0.01)


def test_dtype_and_device(run: Run) -> None:
    words = ("paged_adamw8bit", "--model", TINY, "--dtype", "bfloat16", "--device", "cuda")
    expected = explain("paged_adamw8bit", on_meta(torch.bfloat16), device="cuda")
    out = ok(run(*words))
    assert from_groups_on(out) == from_groups_on(str(expected))
    assert "warning: bfloat16 and float16 parameters are rounded" in out


def test_arguments_are_pairs_or_a_mapping(run: Run) -> None:
    words = ("adam", "--scheduler", "CosineAnnealingLR", "--json")
    pairs = ("--scheduler-arg", "T_max=50", "--scheduler-arg", "eta_min=1e-5")
    mapping = ("--scheduler-arg", "{T_max: 50, eta_min: 1e-5}")
    first, second = (json.loads(ok(run(*words, *more)))["scheduler"] for more in (pairs, mapping))
    assert first == second
    assert first["arguments"] == {"T_max": 50, "eta_min": 1e-5}
    assert first["steps"] == 50


def test_a_rule_that_matches_nothing_fails_and_shows_all(run: Run) -> None:
    out = ok(run("adam", RULE.replace("head.*", "x.*"), "--model", TINY), code=1)
    assert "problem: param_groups.head: matches no parameter" in out
    assert "\ngroup default: " in out


def test_a_scheduler_that_raises_fails_and_shows_all(run: Run) -> None:
    words = ("--scheduler", "OneCycleLR", "--scheduler-arg", "{max_lr: 1, total_steps: 9}")
    assert "lr at step" in ok(run("adam", *words))
    assert "problem: OneCycleLR raises after 10 steps" in ok(
        run("adam", *words, "--steps", 11), code=1
    )


# ---- schedulers of an app's config -------------------------------------------------------------

APP = """
optimizer: {name: adamw8bit, lr: 0.5}
trainer: {max_steps: 40}
%s:
  _target_: torch.optim.lr_scheduler.CosineAnnealingLR
  _partial_: true
  T_max: ${trainer.max_steps}
"""


@pytest.mark.parametrize("key", ["scheduler", "lr_scheduler"])
def test_the_apps_scheduler_is_taken(key: str, run: Run, write: Write) -> None:
    file = write(APP % key)
    told = json.loads(ok(run(file, "--json")))["scheduler"]
    assert (told["name"], told["steps"], told["arguments"]) == (
        "CosineAnnealingLR",
        40,
        {"T_max": 40},
    )
    told = json.loads(ok(run(file, "trainer.max_steps=20", "--json")))["scheduler"]
    assert told["steps"] == 20
    told = json.loads(ok(run(file, "--scheduler-arg", "eta_min=0.1", "--json")))["scheduler"]
    assert told["rates"][0]["min"]["value"] > 0.1
    words = ("--scheduler", "ExponentialLR", "--scheduler-arg", "gamma=0.5")
    assert json.loads(ok(run(file, *words, "--json")))["scheduler"]["name"] == "ExponentialLR"
    assert json.loads(ok(run(file, "--scheduler", "none", "--json")))["scheduler"] is None


def test_the_scheduler_of_a_composition_is_taken(run: Run, write: Write) -> None:
    text = (APP % "scheduler").replace("{name: adamw8bit, lr: 0.5}", "{lr: 0.5}")
    head = "defaults: [{optimizer: lamb8bit}, _self_]\n"
    file = write(f"{head}hydra: {{searchpath: ['pkg://optfactory.configs']}}{text}")
    told = json.loads(ok(run(file, "scheduler.T_max=30", "--json")))
    assert (told["config"]["name"], told["scheduler"]["steps"]) == ("lamb8bit", 30)


@pytest.mark.parametrize(
    "node",
    [
        "{_target_: tests.explaining.forbidden.imported}",
        "{_target_: os.system, command: ''}",
        "{_target_: torch.optim.lr_scheduler.types.FunctionType}",
        "{_target_: SequentialLR, milestones: [], schedulers: "
        "[{_target_: tests.explaining.forbidden.imported}]}",
    ],
)
def test_a_file_does_not_decide_what_is_imported(node: str, run: Run, write: Write) -> None:
    file = write(f"optimizer: {{name: adam}}\nscheduler: {node}\n")
    message = refused(run(file))
    assert "is not imported for a file; that is done for torch.optim.lr_scheduler.*" in message
    assert "--scheduler none" in message
    assert "tests.explaining.forbidden" not in sys.modules
    refused(run(file, "--scheduler-arg", "a=1"))
    ok(run(file, "--scheduler", "none"))


@pytest.mark.parametrize(
    ("node", "is_noted"),
    [("cosine", True), ("{T_max: 3}", True), ("null", False), ("[1]", True), ("{}", False)],
)
def test_other_nodes_of_that_name_are_none_of_ours(
    node: str, is_noted: bool, run: Run, write: Write
) -> None:
    file = write(f"optimizer: {{name: adam}}\nscheduler: {node}\n")
    told = json.loads(ok(run(file, "--json")))
    notes = ["scheduler: left out, as it is no mapping with _target_"] * is_noted
    assert (told["scheduler"], told["notes"]) == (None, notes)
    assert [line for line in ok(run(file)).splitlines() if line.startswith("note: ")] == [
        f"note: {note}" for note in notes
    ]
    assert "note: " not in ok(
        run(file, "--scheduler", "ExponentialLR", "--scheduler-arg", "gamma=1")
    )


def test_of_two_nodes_the_one_that_is_left_out_is_said(run: Run, write: Write) -> None:
    both = APP % "scheduler" + "lr_scheduler: {_target_: StepLR, step_size: 3}\n"
    told = json.loads(ok(run(write(both), "--json")))
    assert told["scheduler"]["name"] == "CosineAnnealingLR"
    assert told["notes"] == ["lr_scheduler: left out, as the config's 'scheduler' is taken"]
    other = APP % "lr_scheduler" + "scheduler: {T_max: 3}\n"
    told = json.loads(ok(run(write(other), "--json")))
    assert told["scheduler"]["name"] == "CosineAnnealingLR"
    assert told["notes"] == ["scheduler: left out, as it is no mapping with _target_"]
    empty = APP % "scheduler" + "lr_scheduler: null\n"
    assert json.loads(ok(run(write(empty), "--json")))["notes"] == []


@pytest.mark.parametrize(
    ("value", "message"),
    [("'???'", "scheduler.T_max: a value is missing"), ("'${nowhere}'", "cannot be resolved")],
)
def test_a_node_that_is_not_complete_is_refused(
    value: str, message: str, run: Run, write: Write
) -> None:
    file = write((APP % "scheduler").replace("${trainer.max_steps}", value))
    assert message in refused(run(file))


# ---- refusals ----------------------------------------------------------------------------------

NEVER = "tests.explaining.forbidden:made"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("adm8bit",), "Did you mean 'adam8bit'"),
        (("adam8bit", "lrr=1"), "did you mean 'lr'"),
        (("adam", "--scheduler", "Cosine"), "Did you mean"),
        (("adam", "--scheduler", "StepLR", "--steps", "0"), "steps is a number"),
        (("adam", "--device", "nosuch"), "device is one such as"),
    ],
)
def test_what_is_wrong_is_said_before_the_model_is_made(
    words: tuple[str, ...], message: str, run: Run
) -> None:
    assert message in refused(run(*words, "--model", NEVER))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("adam", "--steps", "5"), "--steps is for a scheduler"),
        (("adam", "--plot", "x.png"), "--plot is for a scheduler"),
        (("adam", "--dtype", "float16"), "--dtype is for --model"),
        (("adam", "--device", "cpu"), "--device is for --model"),
        (("adam", "--scheduler-arg", "a=1"), "--scheduler-arg is for --scheduler"),
        (("adam", "--scheduler", "StepLR", "--scheduler-arg", "3"), "is k=v"),
        (("adam", "--scheduler", "StepLR", "--scheduler-arg", "{a: [1"), "cannot be read"),
        (("adam", *COSINE, "--scheduler-arg", "optimizer=3"), "--scheduler-arg optimizer: "),
        (("adam", *COSINE, "--scheduler-arg", "_target_=StepLR"), "--scheduler-arg _target_: "),
        (("adam", "--scheduler", "StepLR", "--steps", "x"), "invalid int value"),
        (("nosuch.yaml",), "no such file"),
        ((), "required"),
        (("adam", *COSINE, "--plot", "x.jpg"), ".png, .pdf, .svg"),
        (("adam", "--scheduler", "ReduceLROnPlateau", "--plot", "x.png"), "depends on metrics"),
    ],
)
def test_wrong_usage_exits_with_2(words: tuple[str, ...], message: str, run: Run) -> None:
    if "--plot" in words:
        pytest.importorskip("matplotlib")
    assert message in refused(run(*words), code=2)


def test_without_matplotlib_a_picture_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    words = ("adam", *COSINE, "--plot", "x.png", "--model", NEVER)
    assert "pip install matplotlib" in refused(run(*words), code=2)


def test_errors_are_json_when_asked(run: Run) -> None:
    err = refused(run("adam", "--scheduler", "Cosine", "--json"))
    assert json.loads(err)["error"]["type"] == "ConfigError"


def test_the_parser_and_the_package_load_no_torch() -> None:
    code = "import sys, optfactory\nfrom optfactory.cli import parser\n"
    code += "parser.parse(['explain', 'adam'])\nprint('torch' in sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout.strip() == "False", done.stderr
