"""examples/benchmark.py in its smallest form: every part runs and its figures have a sense."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_every_part_reports(tmp_path):
    file = tmp_path / "figures.json"
    options = ["--quick", "--names", "adamw8bit", "paged_lamb", "--json", file]
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "benchmark.py"), *map(str, options)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(file.read_text())
    assert figures["bandwidth"] > 0
    times = {row["name"]: row for row in figures["time"]}
    assert list(times) == ["torch_fused", "torch_foreach", "adamw8bit", "paged_lamb"]
    assert all(row["times_limit"] > 0 and row["times_fused"] > 0 for row in times.values())
    assert times["adamw8bit"]["state_bytes_per_param"] < 2.2
    assert times["paged_lamb"]["state_bytes_per_param"] == pytest.approx(8, rel=0.01)
    if sys.platform == "linux":
        assert [row["name"] for row in figures["memory"]] == [
            "torch_fused",
            "adamw8bit",
            "paged_lamb",
        ]
        assert all(row["extra"] < 32 for row in figures["memory"])
    assert [(row["name"], row["cache"]) for row in figures["startup"]] == [
        (name, cache) for name in ("adamw8bit", "paged_lamb") for cache in ("cold", "warm")
    ]
