"""examples/train_lm.py as a user runs it: a process, a name, an output folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from optfactory import resolve

ROOT = Path(__file__).parents[2]
TINY = ["steps=60", "warmup=2", "eval_every=20", "eval_batches=2", "batch=8", "context=16"]
TINY += ["model.width=32", "model.depth=1", "model.heads=2"]

pytestmark = pytest.mark.slow


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("the quick brown fox jumps over the lazy dog; é\n" * 400, encoding="utf-8")
    return file


def run_app(out: Path, *overrides: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "examples" / "train_lm.py"), *TINY, *overrides]
    return subprocess.run(
        [*command, f"hydra.run.dir={out}"],
        cwd=out.parent,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def metrics_of(out: Path, *overrides: str) -> dict:
    done = run_app(out, *overrides)
    assert done.returncode == 0, done.stderr
    return json.loads((out / "metrics.json").read_text())


@pytest.mark.parametrize("name", ["paged_adam8bit", "lamb8bit", "adamw", "muon8bit"])
def test_loss_falls_and_the_report_is_written(name, text, tmp_path):
    out = tmp_path / "out"
    metrics = metrics_of(out, f"optimizer={name}", f"data={text}")
    assert metrics["optimizer"] == name
    assert metrics["val_loss"] < 0.9 * metrics["val_curve"][0][1]
    assert [step for step, _ in metrics["val_curve"]] == [0, 20, 40, 60]
    assert len(metrics["train_curve"]) == 60
    assert metrics["tokens_per_second"] > 0
    assert 0 < metrics["unigram_loss"] < 4
    assert metrics["adam32_state_bytes"] == 8 * metrics["parameters"]
    if name.endswith("8bit"):
        assert metrics["state_bytes"] < metrics["adam32_state_bytes"]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    config = resolve(OmegaConf.load(out / "optimizer.yaml"))
    assert config.name == name
    assert config.lr == {"lamb8bit": 0.02, "muon8bit": 0.016}.get(name, 0.002)  # the app's peak_lr


def test_standard_library_is_the_default_text(tmp_path):
    out = tmp_path / "out"
    metrics = metrics_of(out, "max_bytes=200_000", "steps=2", "optimizer.lr=5e-3")
    assert metrics["val_loss"] > 0
    assert resolve(OmegaConf.load(out / "optimizer.yaml")).lr == 5e-3


@pytest.mark.parametrize("name", ["paged_adamw8bit", "lamb32bit"])
def test_resumed_run_equals_the_uninterrupted_one(name, text, tmp_path):
    saved = tmp_path / "lm.pt"
    common = [f"optimizer={name}", f"data={text}", "steps=12", "eval_every=4"]
    whole = metrics_of(tmp_path / "whole", *common)
    metrics_of(tmp_path / "first", *common, "stop_after=4", f"checkpoint={saved}")
    rest = metrics_of(tmp_path / "rest", *common, f"resume={saved}")
    assert rest["train_curve"] == whole["train_curve"][4:]
    assert rest["val_curve"] == whole["val_curve"][1:]


def test_wrong_optimizer_key_stops_the_run_with_a_hint(text, tmp_path):
    done = run_app(tmp_path / "out", f"data={text}", "+optimizer.lrr=1")
    assert done.returncode != 0
    assert "did you mean 'lr'" in done.stderr
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_too_short_a_text_is_named(tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("too short")
    done = run_app(tmp_path / "out", f"data={short}")
    assert done.returncode != 0
    assert "short.txt: too little text" in done.stderr
