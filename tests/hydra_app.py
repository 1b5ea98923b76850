"""A user's own Hydra app in a folder of its own, run as a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SOURCE = """
import json
import sys

import hydra
from omegaconf import DictConfig, OmegaConf


@hydra.main(config_path="conf", config_name="config", version_base="1.3")
def main(cfg: DictConfig) -> None:
    assert "torch" not in sys.modules, "composing a config must not load torch"
    from optfactory import build_optimizer, resolve

    node = OmegaConf.select(cfg, cfg.get("node", "optimizer"))
    result = {"config": resolve(node).model_dump(mode="json")}
    if cfg.get("build", False):
        import torch

        model = torch.nn.Linear(96, 64)
        before = model.weight.detach().clone()
        optimizer = build_optimizer(node, model)
        model(torch.ones(2, 96)).sum().backward()
        optimizer.step()
        result["changed"] = bool((model.weight != before).all())
        result["state"] = sorted(optimizer.state[model.weight])
    print("RESULT", json.dumps(result))


main()
"""


# Hydra 1.4 advises apps to drop what 1.3 advised them to have.
_ADVICE = "ignore:The version_base parameter"


def write_app(folder: Path, config: str) -> Path:
    """Write the app and its primary config; returns the app's folder."""
    (folder / "conf").mkdir(parents=True)
    (folder / "app.py").write_text(SOURCE)
    (folder / "conf" / "config.yaml").write_text(config)
    return folder


def run_app(
    folder: Path, *arguments: str, python: str = sys.executable, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the app without the caller's PYTHONPATH; warnings are errors."""
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [python, "-W", "error", "-W", _ADVICE, "app.py", *arguments],
        cwd=folder,
        env=inherited | {"HYDRA_FULL_ERROR": "0"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def results(run: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    """What each job of a successful run found, in order."""
    assert run.returncode == 0, run.stderr
    lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, run.stdout
    return [json.loads(line.removeprefix("RESULT ")) for line in lines]


def configs(run: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    """The resolved optimizer config of each job of a successful run, in order."""
    return [result["config"] for result in results(run)]
