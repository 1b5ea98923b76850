"""CONTRIBUTING's worked example, followed in a copy of this checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILE = re.compile(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```", re.S)
FOLDERS = ("optfactory", "kernels", "configs", "tests", "examples")
_LEFT_OUT = shutil.ignore_patterns("__pycache__", ".*_cache")


def follow(folder: Path) -> list[str]:
    """Copy the checkout into a folder, and write there what the example says; gives the names."""
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=_LEFT_OUT)
    for path in (*ROOT.glob("*.md"), ROOT / "pyproject.toml"):
        shutil.copy(path, folder)
    files = FILE.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    for name, text in files:
        (folder / name).write_text(text, encoding="utf-8")
    run(folder, "-m", "optfactory", "configs", "--write")
    return [name for name, _ in files]


def run(folder: Path, *arguments: str, **environment: str) -> str:
    """Run Python on the copy in a process of its own; gives what it printed."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)} | environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-3000:]}"
    return done.stdout
