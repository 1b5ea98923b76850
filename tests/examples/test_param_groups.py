"""examples/param_groups.py as a user runs it: which rules made which group."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINE = re.compile(
    r"(?P<name>\S+) +lr (?P<lr>\S+) +weight_decay (?P<decay>\S+) +(?P<bits>\d+) bits +"
    r"(?P<count>\d+) tensors, the first is (?P<first>\S+)"
)

pytestmark = pytest.mark.slow


def run(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    script = ROOT / "examples" / "param_groups.py"
    return subprocess.run(
        [sys.executable, str(script), *overrides],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def groups(folder: Path, *overrides: str) -> dict[str, re.Match[str]]:
    """The printed lines, by the name of the group."""
    done = run(folder, *overrides)
    assert done.returncode == 0, done.stderr
    found = [LINE.fullmatch(line) for line in done.stdout.splitlines()]
    assert all(found)
    return {match["name"]: match for match in found if match}


def test_every_group_says_which_rules_made_it(tmp_path: Path) -> None:
    found = groups(tmp_path)
    assert list(found)[:2] == ["embeddings+layers[0]", "embeddings+positions+layers[0]"]
    assert found["embeddings+layers[0]"]["first"] == "token.weight"
    assert {match["bits"] for name, match in found.items() if "embeddings" in name} == {"32"}
    assert {match["bits"] for name, match in found.items() if "embeddings" not in name} == {"8"}
    for name, match in found.items():
        assert match["decay"] == ("0.0" if "no_decay" in name else "0.01")
        # Half of a cosine is over; four fifths a layer below the last, half for the positions.
        layer = int(name.partition("[")[2].rstrip("]"))
        lr = 0.5e-3 * 0.8 ** (4 - layer) * (0.5 if "positions" in name else 1)
        assert float(match["lr"]) == pytest.approx(lr, rel=5e-3)
    assert {int(name[-2]) for name in found} == {0, 1, 2, 3, 4}


def test_rules_are_changed_added_and_removed_from_the_command_line(tmp_path: Path) -> None:
    bias = '+optimizer.param_groups.bias={match: "*.bias", lr_scale: 2}'
    changed = "optimizer.param_groups.positions.lr_scale=5"
    found = groups(
        tmp_path, "optimizer=lamb8bit", changed, bias, "~optimizer.param_groups.embeddings"
    )
    assert not [name for name in found if "embeddings" in name]
    assert {match["bits"] for match in found.values()} == {"8"}
    tokens, positions = found["layers[0]"], found["positions+layers[0]"]
    assert float(positions["lr"]) == pytest.approx(5 * float(tokens["lr"]), rel=0.01)
    assert found["no_decay+layers[1]+bias"]["first"].endswith("bias")


def test_a_rule_that_matches_nothing_is_an_error(tmp_path: Path) -> None:
    done = run(tmp_path, "+optimizer.param_groups.typo={match: tokn, lr_scale: 2}")
    assert (done.returncode, done.stdout) == (1, "")
    assert "param_groups.typo: matches no parameter" in done.stderr
