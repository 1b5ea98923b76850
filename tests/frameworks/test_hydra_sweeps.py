"""Hydra multirun over optimizers as a search: Hydra's own sweeper, and Optuna's.

tests/unit/test_hydra_app.py has the config group and globs of names; here an app trains, returns
its loss, and a sweeper chooses.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

ROOT = Path(__file__).parents[2]

CONFIG = """
defaults: [{optimizer: adamw8bit}, _self_]
hydra:
  searchpath: [pkg://optfactory.configs]
  sweep: {dir: sweep}
"""

SOURCE = """
import hydra
import torch

from optfactory import build_optimizer


@hydra.main(config_path="conf", config_name="config", version_base="1.3")
def main(cfg):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, inputs = torch.nn.Linear(64, 64), torch.randn(16, 64)
    optimizer = build_optimizer(cfg.optimizer, model)
    for _ in range(20):
        optimizer.zero_grad()
        loss = (model(inputs) - inputs).square().mean()
        loss.backward()
        optimizer.step()
    with open("runs.jsonl", "a") as file:
        group = optimizer.param_groups[0]
        print(f'["{optimizer.config.name}", {group["lr"]}, {loss.item()}]', file=file)
    return loss.item()


main()
"""


def swept(folder: Path, *arguments: str) -> list[list[Any]]:
    """Name, learning rate and loss of each run of `python app.py -m ARGUMENTS`, in order."""
    (folder / "conf").mkdir()
    (folder / "conf" / "config.yaml").write_text(CONFIG)
    (folder / "app.py").write_text(SOURCE)
    done = subprocess.run(
        [sys.executable, "app.py", "-m", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OPTFACTORY_NO_HYDRA_PLUGIN": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]


def test_hydras_sweeper_tries_every_name_with_every_rate(tmp_path: Path) -> None:
    names, rates = ["adam32bit", "adamw8bit", "paged_lamb8bit"], [1e-3, 0.1]
    runs = swept(tmp_path, f"optimizer={','.join(names)}", "optimizer.lr=1e-3,0.1")
    assert [run[:2] for run in runs] == [[name, lr] for name in names for lr in rates]
    assert len({loss for _, _, loss in runs}) == len(runs)


@pytest.mark.skipif(
    not importlib.util.find_spec("optuna"), reason="hydra-optuna-sweeper is not installed"
)
def test_optuna_finds_the_best_of_names_and_rates(tmp_path: Path) -> None:
    runs = swept(
        tmp_path,
        "hydra/sweeper=optuna",
        "hydra.sweeper.n_trials=6",
        "hydra.sweeper.n_jobs=1",
        "hydra.sweeper.sampler.seed=0",
        "optimizer=choice(adam, lamb8bit, paged_adamw8bit)",
        "optimizer.lr=tag(log, interval(1e-4, 1e-1))",
    )
    assert len(runs) == 6
    assert len({name for name, _, _ in runs}) > 1
    assert all(1e-4 <= lr <= 1e-1 for _, lr, _ in runs)
    found = OmegaConf.load(tmp_path / "sweep" / "optimization_results.yaml")
    name, lr, loss = min(runs, key=lambda run: run[2])
    assert found.best_params == {"optimizer": name, "optimizer.lr": pytest.approx(lr)}
    assert found.best_value == pytest.approx(loss)
