"""What a run leaves in its output folder: curve, metrics and the checked optimizer config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # draws to files; needs no display
import matplotlib.pyplot as plt
import torch
from omegaconf import OmegaConf

from optfactory.bench.machine import processor_name


def write_report(folder: Path, optimizer_config: dict[str, Any], metrics: dict[str, Any]) -> None:
    """Write optimizer.yaml, metrics.json and loss.png into `folder`."""
    OmegaConf.save(OmegaConf.create(optimizer_config), folder / "optimizer.yaml")
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    plot_losses(folder / "loss.png", metrics)


def plot_losses(path: Path, metrics: dict[str, Any]) -> None:
    """Training and validation loss over steps, beside the unigram baseline."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    axes.plot(*zip(*metrics["train_curve"], strict=True), lw=1, alpha=0.6, label="training")
    axes.plot(*zip(*metrics["val_curve"], strict=True), marker="o", ms=4, label="validation")
    axes.axhline(metrics["unigram_loss"], color="grey", ls="--", label="unigram baseline")
    axes.set(xlabel="step", ylabel="loss, nats a character")
    where = f"{metrics['model']}\n{metrics['device']}"
    axes.set_title(f"{metrics['optimizer']}: {where}", fontsize=9, wrap=True)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def device_name(device: str) -> str:
    """The GPU's name, or the processor's with the number of threads."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor_name()}, {torch.get_num_threads()} threads"


def summary(metrics: dict[str, Any]) -> str:
    """The end of a run in four lines."""
    state, adam32 = metrics["state_bytes"], metrics["adam32_state_bytes"]
    return (
        f"{metrics['optimizer']}: {metrics['parameters']:,} parameters, "
        f"{metrics['tokens_per_second']:,.0f} tokens/s, {metrics['seconds']:.0f} s\n"
        f"validation loss {metrics['val_loss']:.3f} nats a character "
        f"(unigram baseline {metrics['unigram_loss']:.3f})\n"
        f"optimizer state {state:,} bytes; 32-bit Adam {adam32:,} "
        f"({adam32 / state:.2f} times as much)"
    )
