"""hydra-zen: the app of docs/pages/how-to/hydra.md, and the shipped group in its place."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "pages" / "how-to" / "hydra.md"
CHOSEN = re.compile(r"^chosen = .*?name=\"train\"\)$", re.M | re.S)
SHIPPED = 'store(train, name="train", hydra_defaults=["_self_", {"optimizer": "adamw8bit"}])'

pytestmark = pytest.mark.skipif(
    not importlib.util.find_spec("hydra_zen"), reason="hydra-zen is not installed"
)


def printed(folder: Path, source: str, *arguments: str) -> str:
    (folder / "app.py").write_text(source)
    done = subprocess.run(
        [sys.executable, "app.py", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OPTFACTORY_NO_HYDRA_PLUGIN": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def source() -> str:
    (found,) = re.findall(
        r"<!-- needs hydra_zen -->\n```python\n(.*?)```", PAGE.read_text("utf-8"), re.S
    )
    return str(found)


def test_the_documented_app_chooses_its_optimizer(tmp_path: Path) -> None:
    assert printed(tmp_path, source()) == "adamw8bit 0.0003\n"
    other = printed(tmp_path, source(), "optimizer.name=lamb8bit", "optimizer.lr=1e-2")
    assert other == "lamb8bit 0.01\n"


def test_the_shipped_group_serves_it_too(tmp_path: Path) -> None:
    assert SHIPPED in PAGE.read_text("utf-8")
    text, count = CHOSEN.subn(SHIPPED, source())
    assert count == 1
    path = "hydra.searchpath=[pkg://optfactory.configs]"  # by itself where optfactory is installed
    assert printed(tmp_path, text, path) == "adamw8bit 0.001\n"
    assert printed(tmp_path, text, path, "optimizer=lamb8bit", "optimizer.lr=1e-2") == (
        "lamb8bit 0.01\n"
    )
