"""Train a small character-level transformer with any optimizer of optfactory, chosen by name.

    python examples/train_lm.py                               # paged_adam8bit, two minutes
    python examples/train_lm.py optimizer=lamb8bit optimizer.lr=1e-2
    python examples/train_lm.py data=book.txt steps=1000 checkpoint=/tmp/lm.pt
    python examples/train_lm.py -m 'optimizer=glob(*8bit)'         # one run for each of them
    torchrun --nproc-per-node 2 examples/train_lm.py checkpoint=/tmp/lm   # FSDP2, on CPUs or GPUs
    torchrun --nproc-per-node 3 examples/train_lm.py resume=/tmp/lm       # goes on, on others

Curve, metrics and the resolved config are written to Hydra's output folder.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import hydra
import torch
import torch.nn.functional as F
from hydra.core.hydra_config import HydraConfig
from lm import processes
from lm.data import Corpus, even_batches, random_batch
from lm.model import CharTransformer
from lm.processes import Processes
from lm.report import device_name, summary, write_report
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from optfactory import build_optimizer, get_optimizer_info, resolve

# Lets conf/train_lm.yaml choose a learning rate by the family of the optimizer's name.
OmegaConf.register_new_resolver(
    "optimizer_family", lambda name: get_optimizer_info(name).family, replace=True
)


def warmup_cosine(step: int, warmup: int, steps: int) -> float:
    """Factor of the learning rate: linear up to 1 over `warmup` steps, then a cosine to 0.1."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return 0.55 + 0.45 * math.cos(math.pi * done)


class Trainer:
    """Model, optimizer, schedule and the place in the data: all that a checkpoint holds."""

    def __init__(self, cfg: DictConfig, corpus: Corpus, team: Processes) -> None:
        torch.manual_seed(cfg.seed)
        self.cfg, self.corpus, self.team, self.step = cfg, corpus, team, 0
        self.model = CharTransformer(corpus.vocab_size, cfg.context, **cfg.model).to(team.device)
        team.shard(self.model)
        self.optimizer = build_optimizer(cfg.optimizer, self.model)
        self.schedule = LambdaLR(
            self.optimizer, lambda step: warmup_cosine(step, cfg.warmup, cfg.steps)
        )
        self.batches = torch.Generator().manual_seed(cfg.seed)
        self.val = even_batches(corpus.val, cfg.eval_batches, cfg.batch, cfg.context)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Mean cross-entropy in nats a character."""
        inputs, targets = self.team.share(batch)
        return F.cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten())

    def train_step(self) -> float:
        """One update; returns the loss before it."""
        cfg = self.cfg
        loss = self.loss(random_batch(self.corpus.train, cfg.batch, cfg.context, self.batches))
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), cfg.grad_clip)
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        return self.team.mean(loss)

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean loss over the fixed validation windows."""
        return sum(self.team.mean(self.loss(batch)) for batch in self.val) / len(self.val)

    def rest(self) -> dict[str, Any]:
        """What the next step depends on beside model and optimizer."""
        return {
            "schedule": self.schedule.state_dict(),
            "batches": self.batches.get_state(),
            "step": self.step,
        }

    def save(self, path: str) -> None:
        """Everything that the next step depends on: a folder under torchrun, else a file."""
        if self.team.are_several:
            processes.save(path, self.model, self.optimizer, self.rest())
            return
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save({**state, **self.rest()}, path)

    def load(self, path: str) -> None:
        """Go on exactly where `save` left, on any number of processes."""
        saved = self.rest()
        if Path(path).is_dir():
            processes.load(path, self.model, self.optimizer, saved)
        else:
            saved = torch.load(path, weights_only=True)
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
        self.schedule.load_state_dict(saved["schedule"])
        self.batches.set_state(saved["batches"])
        self.step = saved["step"]


def fit(trainer: Trainer) -> dict[str, Any]:
    """Train to the end, with a progress bar; returns the curves and the timing."""
    cfg, first = trainer.cfg, trainer.step
    last = min(cfg.steps, first + (cfg.stop_after or cfg.steps))
    if first >= last:
        raise ValueError(f"the checkpoint is at step {first}: nothing to do for steps={cfg.steps}")
    val_loss = trainer.evaluate()
    train_curve: list[tuple[int, float]] = []
    val_curve = [(first, val_loss)]
    training_seconds = 0.0
    quiet = not trainer.team.is_first
    with tqdm(range(first, last), unit="step", dynamic_ncols=True, disable=quiet) as bar:
        for _ in bar:
            begin = time.perf_counter()
            train_loss = trainer.train_step()
            training_seconds += time.perf_counter() - begin
            train_curve.append((trainer.step, train_loss))
            if trainer.step % cfg.eval_every == 0 or trainer.step == last:
                val_loss = trainer.evaluate()
                val_curve.append((trainer.step, val_loss))
                if cfg.checkpoint:
                    trainer.save(cfg.checkpoint)
            speed = len(train_curve) * cfg.batch * cfg.context / training_seconds
            bar.set_postfix_str(f"loss {train_loss:.3f}, val {val_loss:.3f}, {speed:,.0f} tokens/s")
    return {
        "val_loss": val_loss,
        "tokens_per_second": speed,
        "train_curve": train_curve,
        "val_curve": val_curve,
    }


@hydra.main(version_base="1.3", config_path="conf", config_name="train_lm")
def main(cfg: DictConfig) -> float:
    """Train, report, and return the validation loss (so that a Hydra sweeper can minimise it)."""
    with processes.started(cfg.device) as team:
        return run(cfg, team)


def run(cfg: DictConfig, team: Processes) -> float:
    """`main` on each process."""
    begin = time.perf_counter()
    config = resolve(cfg.optimizer)  # checked before any work is done
    corpus = Corpus.load(cfg.data, cfg.max_bytes, cfg.context)
    if team.is_first:
        print(
            f"{corpus.source}: {len(corpus.train):,} characters for training, "
            f"{len(corpus.val):,} for validation, {corpus.vocab_size} symbols"
        )
    trainer = Trainer(cfg, corpus, team)
    if cfg.resume:
        trainer.load(cfg.resume)
    metrics = fit(trainer)

    parameters = sum(p.numel() for p in trainer.model.parameters())
    metrics |= {
        "optimizer": config.name,
        "lr": config.lr,
        "seed": cfg.seed,
        "model": f"character transformer, {cfg.model.depth} blocks of width {cfg.model.width}",
        "device": device_name(team.device),
        "parameters": parameters,
        "unigram_loss": corpus.unigram_loss(),
        "state_bytes": trainer.optimizer.memory_report().state_bytes,
        "adam32_state_bytes": 8 * parameters // team.count,  # two fp32 states a parameter
        "seconds": time.perf_counter() - begin,
    }
    folder = Path(HydraConfig.get().runtime.output_dir)
    if team.is_first:
        write_report(folder, config.model_dump(mode="json"), metrics)
        print(f"{summary(metrics)}\nreport in {folder}")
    return metrics["val_loss"]


if __name__ == "__main__":
    main()
