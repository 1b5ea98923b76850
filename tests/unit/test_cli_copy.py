"""`optfactory copy`: a config or ready rules in a folder of the user's; nothing is overwritten."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from optfactory import list_optimizers, list_rules, ready_rules, resolve
from optfactory.catalog.files import config_folder
from optfactory.cli import main
from tests.command_line import Run, runner
from tests.hydra_app import configs, run_app, write_app

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `optfactory copy` in this process: exit code, stdout, stderr."""
    return runner(capsys, "copy")


def shipped(name: str) -> str:
    return (config_folder() / f"{name}.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", list_optimizers())
def test_a_config_is_copied_without_the_line_that_says_generated(
    name: str, run: Run, tmp_path: Path
) -> None:
    folder = tmp_path / "conf" / "optimizer"  # made with its parents
    target = folder / f"{name}.yaml"
    assert run(name, folder) == (0, f"wrote {target}\n", "")
    text = target.read_text(encoding="utf-8")
    first, _, rest = shipped(name).partition("\n")
    assert first.startswith("# generated")
    assert text == rest
    assert "generated" not in text
    assert resolve(yaml.safe_load(text)) == resolve(name)
    assert main(["check", str(target)]) == 0


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("AdamW8bit", "adamw8bit"),
        ("paged_adamw_8bit", "paged_adamw8bit"),
        ("bnb-paged-lamb32bit", "paged_lamb32bit"),
    ],
)
def test_an_alias_is_copied_under_its_name(alias: str, name: str, run: Run, tmp_path: Path) -> None:
    assert run(alias, tmp_path)[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == [f"{name}.yaml"]
    assert yaml.safe_load((tmp_path / f"{name}.yaml").read_text())["name"] == name


@pytest.mark.parametrize("name", list_rules())
def test_ready_rules_are_copied_as_they_are(name: str, run: Run, tmp_path: Path) -> None:
    target = tmp_path / f"{name}.yaml"
    assert run(name, tmp_path) == (0, f"wrote {target}\n", "")
    assert target.read_text() == shipped(f"param_groups/{name}")
    rules: dict[str, Any] = yaml.safe_load(target.read_text())
    assert rules == ready_rules(name)
    assert resolve("adamw8bit", param_groups=rules).param_groups


def test_a_file_that_is_there_is_kept_unless_forced(run: Run, tmp_path: Path) -> None:
    target = tmp_path / "adam.yaml"
    target.write_text("mine\n")
    code, out, err = run("adam", tmp_path)
    assert (code, out) == (2, "")
    assert err == f"error: {target} is there already; give --force to replace it\n"
    assert target.read_text() == "mine\n"
    assert run("adam", tmp_path, "--force")[0] == 0
    assert resolve(yaml.safe_load(target.read_text())) == resolve("adam")
    assert run("adamw", tmp_path)[0] == 0  # others are no obstacle


def test_json(run: Run, tmp_path: Path) -> None:
    target = tmp_path / "lamb8bit.yaml"
    code, out, err = run("lamb8bit", tmp_path, "--json")
    assert (code, json.loads(out), err) == (0, {"file": str(target)}, "")
    code, out, err = run("lamb8bit", tmp_path, "--json")
    assert (code, out) == (2, "")
    assert "--force" in json.loads(err)["error"]["message"]
    code, out, err = run("lmab8bit", tmp_path, "--json")
    assert (code, out) == (1, "")
    assert json.loads(err)["error"]["type"] == "UnknownOptimizerError"


@pytest.mark.parametrize("name", ["adm8bit", "no_decay", "../adam", "", "adam.yaml"])
def test_an_unknown_name_is_refused_and_nothing_is_made(
    name: str, run: Run, tmp_path: Path
) -> None:
    code, out, err = run(name, tmp_path / "conf")
    assert (code, out) == (1, "")
    assert err.startswith(f"error: unknown optimizer '{name}'")
    assert "no_decay_1d" in err
    assert not (tmp_path / "conf").exists()


def test_a_folder_that_cannot_be_made_or_written_is_wrong_usage(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "deeper", "/proc/no/such", "/dev/null"):
        code, out, err = run("adam", folder)
        assert (code, out) == (2, "")
        assert err.startswith("error: cannot write ")
        assert len(err.splitlines()) == 1
    (tmp_path / "adam.yaml").mkdir()
    assert run("adam", tmp_path)[0] == 2
    assert run("adam", tmp_path, "--force")[0] == 2
    assert list((tmp_path / "adam.yaml").iterdir()) == []


@pytest.mark.parametrize("words", [(), ("adam",), ("adam", "a", "b"), ("adam", "a", "--forse")])
def test_wrong_usage_exits_with_2(words: tuple[str, ...], run: Run, tmp_path: Path) -> None:
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert "usage: optfactory" in err


def test_a_hydra_app_takes_the_copies(run: Run, tmp_path: Path) -> None:
    config = "defaults: [{optimizer: mine}, {optimizer/param_groups: no_decay_1d}, _self_]\n"
    app = write_app(tmp_path / "app", config)
    group = app / "conf" / "optimizer"
    assert run("paged_adamw8bit", group)[0] == 0
    assert run("no_decay_1d", group / "param_groups")[0] == 0
    mine = (group / "paged_adamw8bit.yaml").rename(group / "mine.yaml")
    mine.write_text(mine.read_text().replace("lr: 0.001", "lr: 0.25 "))
    (found,) = configs(run_app(app, PYTHONPATH=str(ROOT), OPTFACTORY_NO_HYDRA_PLUGIN="1"))
    rules = ready_rules("no_decay_1d")
    expected = resolve("paged_adamw8bit", lr=0.25, param_groups=rules)
    assert found == expected.model_dump(mode="json")


def test_commands_about_configs_never_load_torch(tmp_path: Path) -> None:
    commands = [["list"], ["show", "adam8bit", "lr=1"], ["check", "lamb"], ["schema"]]
    commands += [["schema", "adamw"], ["copy", "adam", str(tmp_path)], ["copy", "llama", "x"]]
    code = f"""
import contextlib, io, sys
import optfactory
assert not {{"torch", "pydantic"}} & sys.modules.keys()
from optfactory.cli import main
for words in {commands!r}:
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(words) == 0, words
    assert not {{"torch", "numpy", "cupy", "matplotlib"}} & sys.modules.keys(), words
"""
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
