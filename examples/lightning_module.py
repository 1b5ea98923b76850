"""Train a LightningModule with an optimizer of optfactory, chosen by name or by class.

    python examples/lightning_module.py fit                            # paged_adamw8bit
    python examples/lightning_module.py fit --model.optimizer=lamb8bit --model.lr=1e-2
    python examples/lightning_module.py fit --optimizer=AdamW8bit --optimizer.lr=3e-3
    python examples/lightning_module.py fit --trainer.max_epochs=6 --ckpt_path=outputs/last.ckpt

A run goes on with the optimizer that is named then: any of the same family, `adamw` say; another
family's state means something else, and is refused. The learning rate goes on as in the checkpoint.

With `--optimizer`, LightningCLI itself makes the optimizer and `configure_optimizers` is not
called; it knows the arguments and their types (`--optimizer.help=AdamW8bit` lists them). The model
learns a few random sequences by heart, so nothing is downloaded.

Needs Lightning: pip install lightning 'jsonargparse[signatures]'
"""

from __future__ import annotations

from typing import Any

import lightning
import torch
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.utils.data import DataLoader

import optfactory.optim  # noqa: F401 - LightningCLI finds imported classes by their short names
from optfactory import build_optimizer

VOCABULARY = 1024


class LanguageModel(lightning.LightningModule):
    """Predicts each token of a sequence from the one before it.

    Args:
        optimizer: a name of optfactory; `optfactory list` shows them.
        lr: the learning rate behind the warm-up.
    """

    def __init__(self, optimizer: str = "paged_adamw8bit", lr: float = 1e-2) -> None:
        super().__init__()
        # Without save_hyperparameters(): LightningCLI takes what that saves from the checkpoint of
        # --ckpt_path, whatever the command line says.
        self.optimizer, self.lr = optimizer, lr
        self.layers = nn.Sequential(
            nn.Embedding(VOCABULARY, 128),
            nn.Linear(128, 128),
            nn.Tanh(),
            nn.Linear(128, VOCABULARY),
        )

    def training_step(self, tokens: Tensor, index: int) -> Tensor:
        logits = self.layers(tokens[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = build_optimizer(self.optimizer, self, lr=self.lr)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=8)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


class Sequences(lightning.LightningDataModule):
    """Random sequences of tokens, the same ones each time."""

    def train_dataloader(self) -> DataLoader[Tensor]:
        rows = torch.randint(VOCABULARY, (64, 17), generator=torch.Generator().manual_seed(0))
        return DataLoader(rows, batch_size=8)


def main() -> None:
    cli = LightningCLI(
        LanguageModel,
        Sequences,
        trainer_defaults={
            "max_epochs": 4,
            "accelerator": "cpu",
            "default_root_dir": "outputs",
            "gradient_clip_val": 1.0,
            "logger": False,
            "enable_checkpointing": False,  # `main` saves the one that it needs
        },
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
    )
    cli.trainer.save_checkpoint("outputs/last.ckpt")
    optimizer = cli.trainer.optimizers[0]
    print(f"{type(optimizer).__name__}, loss {cli.trainer.callback_metrics['loss']:.3f}")
    print(optimizer.memory_report())


if __name__ == "__main__":
    main()
