"""Every snippet of the README runs, and prints what the README says."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from optfactory import list_optimizers
from optfactory.cli import main

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"(?:<!-- (?P<note>[^\n]*) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)```", re.S)
INSTALLATIONS = ("main job", "test command")  # run by CI itself


@dataclass
class Snippet:
    note: str
    language: str
    text: str


SNIPPETS = [
    Snippet(match["note"] or "", match["language"], match["text"])
    for match in BLOCK.finditer((ROOT / "README.md").read_text(encoding="utf-8"))
]


def noted(prefix):
    return [snippet for snippet in SNIPPETS if snippet.note.startswith(prefix)]


def test_every_snippet_is_of_a_kind_that_a_test_runs():
    kinds = {
        "python" if not snippet.note and snippet.language == "python" else snippet.note
        for snippet in SNIPPETS
    }
    files = {f"file: {name}" for name in ("app.py", "conf/config.yaml")}
    others = {"python", "output", "run", "run in the folder of app.py", *INSTALLATIONS}
    others |= {"under torchrun"}  # as examples/fsdp2.py, which tests/examples runs
    assert kinds == files | others


def test_python_snippets_run_in_order_and_print_what_the_readme_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed = io.StringIO()
    names: dict[str, object] = {}
    with contextlib.redirect_stdout(printed):
        for snippet in SNIPPETS:
            if snippet.language == "python" and not snippet.note:
                exec(compile(snippet.text, "README.md", "exec"), names)
    (output,) = noted("output")
    assert printed.getvalue().endswith(output.text)


@pytest.mark.parametrize(
    "line",
    [line for s in noted("run") if s.note == "run" for line in s.text.splitlines()],
)
def test_command_lines_run(line, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    command, *arguments = shlex.split(line)
    assert command == "optfactory"
    assert main(arguments) == 0
    assert capsys.readouterr().out


def test_the_hydra_app_runs(tmp_path):
    for snippet in noted("file: "):
        target = tmp_path / snippet.note.removeprefix("file: ")
        target.parent.mkdir(exist_ok=True)
        target.write_text(snippet.text)
    plugins = tmp_path / "site" / "hydra_plugins"
    plugins.mkdir(parents=True)
    # As the wheel installs it; the tests may run uninstalled.
    (plugins / "optfactory").symlink_to(ROOT / "optfactory" / "_hydra_plugin")
    path = os.pathsep.join([str(ROOT), str(plugins.parent)])
    (commands,) = noted("run in the folder of app.py")
    for line in commands.text.splitlines():
        command, *arguments = shlex.split(line)
        assert command == "python"
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        printed = re.findall(r"^(\w+) ([\w+]+) [\d.]+ [\d.]+$", done.stdout, re.M)
        rules = {group for _, groups in printed for group in groups.split("+")}
        assert rules == {"default", "head", "no_decay"} - {
            word[1:].split(".")[-1] for word in arguments if word[0] == "~"
        }
        names = list_optimizers("adam*8bit") if "--multirun" in arguments else ["one"]
        assert len({name for name, _ in printed}) == len(names)


def test_every_environment_variable_of_the_package_is_in_the_guide() -> None:
    read = set()
    for path in (ROOT / "optfactory").rglob("*.py"):
        read |= set(re.findall(r"\bOPTFACTORY_[A-Z_]+\b", path.read_text(encoding="utf-8")))
    guide = (ROOT / "examples" / "guide.md").read_text(encoding="utf-8")
    assert read
    assert not [name for name in sorted(read) if f"| `{name}` |" not in guide]
