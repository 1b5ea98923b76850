"""LightningCLI: classes chosen by name or path, arguments typed and refused by the parser."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from optfactory import Optimizer2State, get_optimizer_info, optim
from optfactory.errors import ConfigError
from tests.frameworks.harness import (
    CLASSES,
    assert_kept_as_named,
    batches,
    loss_of,
    network,
)

lightning = pytest.importorskip("lightning")
jsonargparse = pytest.importorskip("jsonargparse", reason="LightningCLI needs jsonargparse")
from lightning.pytorch.cli import LightningCLI, OptimizerCallable  # noqa: E402

pytestmark = [
    # What Lightning itself does with torch and jsonargparse, and its advice; none of it is ours.
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
]


class Net(lightning.LightningModule):
    """A model without `configure_optimizers`: the command line chooses the optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return loss_of(self.net, batch)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.cat(batches()), batch_size=4)


class NetOfCallable(Net):
    """A model that takes a function from parameters to an optimizer, as Lightning suggests."""

    def __init__(self, optimizer: OptimizerCallable = torch.optim.Adam) -> None:
        super().__init__()
        self.optimizer = optimizer

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs `train.py fit ARGUMENTS` for two steps and gives the optimizer."""

    def run(*arguments: str, model: type[Net] = Net) -> Optimizer2State:
        monkeypatch.setattr(sys, "argv", ["train.py", "fit", *arguments])
        defaults = {
            "accelerator": "cpu",
            "max_steps": 2,
            "default_root_dir": str(tmp_path),
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
        }
        cli = LightningCLI(
            model,
            trainer_defaults=defaults,
            seed_everything_default=False,
            save_config_callback=None,
        )
        optimizer = cli.trainer.optimizers[0]
        assert next(iter(optimizer.state.values()))["step"] == 2
        return optimizer

    return run


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_is_chosen_by_its_path(name: str, train: Any) -> None:
    unclear = name.removeprefix("Paged").startswith("Adam") and "AdamW" not in name
    optimizer = train(
        f"--optimizer=optfactory.optim.{name}",
        *(["--optimizer.adam_w_mode=true"] if unclear else []),
        "--optimizer.lr=3e-3",
        "--optimizer.betas=[0.8, 0.9]",
        "--optimizer.weight_decay=0.1",
        "--optimizer.min_8bit_size=256",
    )
    assert type(optimizer) is CLASSES[name]
    assert_kept_as_named(optimizer, name)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (3e-3, (0.8, 0.9), 0.1)
    assert group["min_8bit_size"] == 256


def test_a_name_that_torch_has_too_asks_for_the_path(
    train: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train("--optimizer=AdamW")
    message = capsys.readouterr().err
    assert "torch.optim.AdamW" in message
    assert "optfactory.optim.AdamW" in message


@pytest.mark.parametrize(
    ("argument", "reason"),
    [
        ("lrr=1e-3", "'lrr' is not accepted"),
        ("fused=true", "'fused' is not accepted"),
        ("momentum=0.9", "'momentum' is not accepted"),
        ("lr=fast", "fast"),
        ("betas=[0.9]", "2 elements"),
        ("betas=[0.9, high]", "high"),
        ("eps=[1]", "eps"),
        ("block_wise=7", "block_wise"),
        ("min_8bit_size=1.5", "min_8bit_size"),
        ("is_paged=perhaps", "perhaps"),
    ],
)
def test_the_parser_refuses_wrong_arguments(
    argument: str, reason: str, train: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        train("--optimizer=optfactory.optim.PagedAdamW8bit", f"--optimizer.{argument}")
    assert stopped.value.code == 2
    message = capsys.readouterr().err.partition("error:")[2]
    assert reason in message
    assert "optfactory.optim.PagedAdamW8bit" in message


@pytest.mark.parametrize("argument", ["betas=[0.9, 1.5]", "amsgrad=true", "optim_bits=16", "lr=-1"])
def test_what_no_type_tells_is_refused_by_the_optimizer(argument: str, train: Any) -> None:
    key = argument.partition("=")[0]
    with pytest.raises(ConfigError, match=rf"'adamw8bit'[\s\S]*optimizer\.{key}"):
        train("--optimizer=optfactory.optim.AdamW8bit", f"--optimizer.{argument}")


def test_a_config_file_chooses_optimizer_and_schedule(train: Any, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        "optimizer:\n"
        "  class_path: optfactory.optim.LAMB8bit\n"
        "  init_args: {lr: 1e-2, eps: 1e-6, betas: [0.9, 0.95], max_unorm: null}\n"
        "lr_scheduler:\n"
        "  class_path: torch.optim.lr_scheduler.ExponentialLR\n"
        "  init_args: {gamma: 0.5}\n"
        "trainer: {gradient_clip_val: 0.5, accumulate_grad_batches: 2}\n"
    )
    optimizer = train(f"--config={file}", "--optimizer.eps=1e-7")
    group = optimizer.param_groups[0]
    assert (group["initial_lr"], group["eps"], group["betas"]) == (1e-2, 1e-7, (0.9, 0.95))
    assert (optimizer.config.name, optimizer.config.max_unorm) == ("lamb8bit", None)


@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdam", "LAMB"])
def test_a_printed_config_builds_the_same_optimizer(
    name: str, train: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    choice = [f"--optimizer=optfactory.optim.{name}", "--optimizer.lr=3e-3"]
    with pytest.raises(SystemExit) as stopped:
        train(*choice, "--print_config")
    assert stopped.value.code == 0
    (tmp_path / "all.yaml").write_text(capsys.readouterr().out)
    assert train(f"--config={tmp_path / 'all.yaml'}").config == train(*choice).config


def test_a_model_takes_a_function_that_makes_the_optimizer(train: Any) -> None:
    choice = ["--model.optimizer=optfactory.optim.PagedAdam8bit", "--model.optimizer.lr=0.25"]
    optimizer = train(*choice, model=NetOfCallable)
    assert type(optimizer) is optim.PagedAdam8bit
    assert optimizer.param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize("option", ["signed_map=symmetric", "nonfinite=skip_step", "maximize=true"])
def test_options_around_the_rule_are_arguments_too(option: str, train: Any) -> None:
    key, _, value = option.partition("=")
    optimizer = train("--optimizer=optfactory.optim.AdamW8bit", f"--optimizer.{option}")
    assert str(optimizer.param_groups[0][key]).lower() == value


@pytest.mark.parametrize("name", CLASSES)
def test_every_field_of_the_config_is_a_typed_argument(name: str) -> None:
    parser = jsonargparse.ArgumentParser()
    known = parser.add_class_arguments(CLASSES[name], skip={"params"})
    config = get_optimizer_info(name).config_class
    stated = {"name", *config.locked}
    assert set(config.model_fields) - stated <= set(known)
