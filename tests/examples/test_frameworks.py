"""examples/hf_trainer.py and examples/lightning_module.py as a user runs them."""

from __future__ import annotations

import logging
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from optfactory.errors import StateError

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = pytest.mark.slow

Run = Callable[..., str]


@pytest.fixture
def run(
    fixed_conditions: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[Run]:
    """Runs a script in this process and an empty folder, and gives what it prints."""

    def script(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)  # the models are tiny
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield script
    logger.setLevel(level)


@pytest.mark.parametrize("choice", ["paged_adamw8bit", "AdamW8bit"])
def test_the_trainer_learns_and_resumes(choice: str, run: Run) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    printed = run("hf_trainer.py", choice)
    losses = next(line for line in printed.splitlines() if line.startswith("loss:")).split()[1:]
    assert len(losses) == 4
    assert float(losses[-1]) < 0.9 * float(losses[0])
    assert "the same losses: True" in printed
    assert ("file-mapped" in printed) == (choice == "paged_adamw8bit")


@pytest.mark.parametrize("choice", ["paged_adamw8bit", "AdamW8bit"])
def test_both_ways_of_the_trainer_have_its_own_groups(choice: str, tmp_path: Path) -> None:
    # So TrainingArguments' weight decay spares biases and norms, and its checkpoints go on.
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    trainer = runpy.run_path(str(EXAMPLES / "hf_trainer.py"))["make_trainer"](choice, tmp_path)
    own = transformers.Trainer(trainer.model, trainer.args).create_optimizer()
    assert type(own) is torch.optim.AdamW
    found = [
        [([id(p) for p in group["params"]], group["weight_decay"]) for group in groups]
        for groups in (trainer.create_optimizer().param_groups, own.param_groups)
    ]
    assert found[0] == found[1]
    assert [decay for _, decay in found[0]] == [0.01, 0.0]


# What Lightning itself does with torch and jsonargparse, and its advice; none of it is ours.
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")
@pytest.mark.filterwarnings("ignore:[\\s\\S]*[Jj]sonargparse|[\\s\\S]*deprecated in v4.49.0")
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_the_lightning_module_learns_and_resumes_as_the_command_line_says(run: Run) -> None:
    pytest.importorskip("lightning")
    pytest.importorskip("jsonargparse")
    printed = run("lightning_module.py", "fit", "--trainer.enable_progress_bar=false")
    first = float(printed.partition("Optimizer2State, loss ")[2].split()[0])
    assert first < 6
    assert "file-mapped" in printed
    resume = ["--trainer.max_epochs=6", "--ckpt_path=outputs/last.ckpt"]
    printed = run("lightning_module.py", "fit", "--trainer.enable_progress_bar=false", *resume)
    assert float(printed.partition("Optimizer2State, loss ")[2].split()[0]) < 0.9 * first

    quiet = ("lightning_module.py", "fit", "--trainer.enable_progress_bar=false")
    resume = ["--trainer.max_epochs=7", "--ckpt_path=outputs/last.ckpt"]
    with pytest.raises(StateError, match="lamb"):
        run(*quiet, "--model.optimizer=lamb8bit", *resume)
    printed = run(*quiet, "--model.optimizer=adamw", *resume)
    assert "file-mapped" not in printed  # goes on with 32-bit state in memory
    assert float(printed.partition("Optimizer2State, loss ")[2].split()[0]) < first


def test_lightning_chooses_a_class_by_its_short_name(tmp_path: Path) -> None:
    # A process of its own: a short name is unique only as long as nothing imports bitsandbytes.
    pytest.importorskip("lightning")
    pytest.importorskip("jsonargparse")
    choice = ["--optimizer=AdamW8bit", "--optimizer.lr=3e-3", "--trainer.max_epochs=1"]
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "lightning_module.py"), "fit", *choice],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "AdamW8bit, loss" in done.stdout
