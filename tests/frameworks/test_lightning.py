"""Lightning: configure_optimizers, clipping, accumulation, schedule, resume and its callbacks."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from optfactory import build_optimizer
from tests.frameworks.harness import (
    NAMES,
    SAMPLE,
    assert_close,
    assert_kept_as_named,
    batches,
    loss_of,
    network,
    one_cycle,
    rate_of,
    weights,
)

lightning = pytest.importorskip("lightning")

pytestmark = [
    # Lightning's own use of torch's and its advice about data loaders; neither is ours.
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
]


class Net(lightning.LightningModule):
    """A regression whose optimizer a function makes."""

    def __init__(
        self, make: Any, dtype: torch.dtype = torch.float32, scheduled: bool = True
    ) -> None:
        super().__init__()
        self.make, self.scheduled = make, scheduled
        self.net = network().to(dtype)
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = loss_of(self.net, batch.to(self.net[0].weight.dtype))
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self)
        if not self.scheduled:
            return optimizer
        schedule = one_cycle(optimizer)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


def fitted(net: Net, epochs: int, folder: Path, resume: Path | None = None, **given: Any) -> Any:
    """A Trainer after `epochs` of eight batches, which are four updates."""
    trainer = lightning.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        max_epochs=epochs,
        gradient_clip_val=0.5,
        accumulate_grad_batches=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **given,
    )
    data = DataLoader(torch.cat(batches()), batch_size=4)
    trainer.fit(net, data, ckpt_path=resume, weights_only=True if resume else None)
    return trainer


def assert_resumes(make: Any, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Two epochs with a stop and a new process' objects between them equal two in one go."""
    whole, first, rest = (Net(make, dtype) for _ in range(3))
    fitted(whole, 2, folder)
    fitted(first, 1, folder).save_checkpoint(folder / "last.ckpt")
    trainer = fitted(rest, 2, folder, resume=folder / "last.ckpt")
    assert whole.losses[-1] < whole.losses[0]
    assert first.losses + rest.losses == whole.losses
    assert weights(rest) == weights(whole)
    return trainer.optimizers[0]


@pytest.mark.parametrize("name", NAMES)
def test_training_goes_on_from_a_checkpoint_bit_for_bit(name: str, tmp_path: Path) -> None:
    def make(model: Net) -> Optimizer:
        return build_optimizer(name, model, lr=rate_of(name))

    optimizer = assert_resumes(make, tmp_path)
    assert_kept_as_named(optimizer, name)


def test_a_bfloat16_model_goes_on_bit_for_bit(tmp_path: Path) -> None:
    def make(model: Net) -> Optimizer:
        return build_optimizer("adamw8bit", model, lr=0.01, param_rounding="stochastic", seed=3)

    assert_resumes(make, tmp_path, torch.bfloat16)


def test_the_trainers_settings_act_as_on_torchs_adamw(tmp_path: Path) -> None:
    ours = Net(lambda model: build_optimizer("adamw", model, weight_decay=0.1))
    theirs = Net(lambda model: torch.optim.AdamW(model.parameters(), weight_decay=0.1))
    for net in (ours, theirs):
        fitted(net, 2, tmp_path)
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-5)
    assert_close(ours, theirs, rtol=1e-4)


@pytest.mark.parametrize("name", SAMPLE)
def test_mixed_precision_trains_as_a_loop_of_ones_own(name: str, tmp_path: Path) -> None:
    net = Net(lambda model: build_optimizer(name, model, lr=0.01))
    fitted(net, 1, tmp_path, precision="bf16-mixed")

    model = network()
    optimizer = build_optimizer(name, model, lr=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=12)
    for index, batch in enumerate(batches()):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, batch)
        (loss / 2).backward()
        if index % 2:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    assert weights(net.net) == weights(model)


class Thaw(lightning.pytorch.callbacks.BaseFinetuning):
    """Trains the last layer for an epoch, then the first one too, as a param group of its own."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=0.005)
        elif epoch > 1:  # resuming restores the group, and freezes the layer again
            self.make_trainable(pl_module.net[0])


@pytest.mark.parametrize("named", [True, False], ids=["named", "tensors"])
@pytest.mark.parametrize("name", SAMPLE)
def test_a_layer_thawed_in_training_becomes_a_group_and_is_resumed(
    name: str, named: bool, tmp_path: Path
) -> None:
    def make(model: Net) -> Optimizer:
        trainable = [p for p in model.parameters() if p.requires_grad]
        return build_optimizer(name, model if named else trainable, lr=0.01)

    def run(epochs: int, resume: Path | None = None) -> tuple[Net, Any]:
        net = Net(make, scheduled=False)  # OneCycleLR takes no groups that come later
        return net, fitted(net, epochs, tmp_path, resume, callbacks=[Thaw()])

    whole, _ = run(3)
    first, trainer = run(2)
    assert weights(first.net[0]) != weights(network()[0])
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    rest, trainer = run(3, resume=tmp_path / "last.ckpt")
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [0.01, 0.005]
    assert first.losses + rest.losses == whole.losses
    assert weights(rest) == weights(whole)


@pytest.mark.parametrize("name", SAMPLE)
def test_fabric_goes_on_from_a_file_bit_for_bit(name: str, tmp_path: Path) -> None:
    def start() -> tuple[Any, Any, Any]:
        fabric = lightning.Fabric(accelerator="cpu", devices=1)
        model = network()
        return fabric, *fabric.setup(model, build_optimizer(name, model, lr=0.01))

    def train(fabric: Any, model: Any, optimizer: Any, steps: range) -> list[float]:
        losses = []
        for step in steps:
            optimizer.zero_grad()
            loss = loss_of(model, batches()[step])
            fabric.backward(loss)
            fabric.clip_gradients(model, optimizer, max_norm=0.5)
            optimizer.step()
            losses.append(loss.item())
        return losses

    expected = train(*start(), range(6))
    fabric, model, optimizer = start()
    losses = train(fabric, model, optimizer, range(3))
    fabric.save(tmp_path / "last.ckpt", {"model": model, "optimizer": optimizer})
    fabric, model, optimizer = start()
    fabric.load(tmp_path / "last.ckpt", {"model": model, "optimizer": optimizer})
    assert losses + train(fabric, model, optimizer, range(3, 6)) == expected
    assert_kept_as_named(optimizer, name)
