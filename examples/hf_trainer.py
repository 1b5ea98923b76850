"""Train with Hugging Face's Trainer and an optimizer of optfactory, and go on from a checkpoint.

    python examples/hf_trainer.py                  # paged_adamw8bit
    python examples/hf_trainer.py lamb8bit         # any name: `optfactory list`
    python examples/hf_trainer.py AdamW8bit        # any class of optfactory.optim

A tiny random Llama learns a few random sequences by heart, so nothing is downloaded.

Needs transformers: pip install transformers accelerate
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from optfactory import optim, optimizer_factory, ready_rules

CONFIG = LlamaConfig(
    vocab_size=1024,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=1,
    num_attention_heads=4,
    max_position_embeddings=16,
)


def optimizer_of(choice: str, arguments: TrainingArguments) -> tuple[Any, dict[str, Any]]:
    """What makes the optimizer, and what it is given beside the parameters.

    The learning rate of TrainingArguments has to be said here either way.
    """
    if choice in optim.__all__:
        # The Trainer makes the param groups: TrainingArguments' weight_decay, none for biases
        # and norms. The classes Adam, Adam8bit, ... want `adam_w_mode` beside it.
        return getattr(optim, choice), {"lr": arguments.learning_rate}
    # Anything else that build_optimizer takes. The rules make the same two groups, so that
    # checkpoints of either way, and of the Trainer's own optimizers, go on with the other.
    return optimizer_factory, {
        "name": choice,
        "lr": arguments.learning_rate,
        "weight_decay": arguments.weight_decay,
        "param_groups": ready_rules("no_decay_1d"),
    }


def make_trainer(choice: str, out: Path) -> Trainer:
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG)
    rows = torch.randint(CONFIG.vocab_size, (32, 16))
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=16,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        max_grad_norm=1.0,
        learning_rate=1e-2,
        weight_decay=0.01,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        logging_steps=4,
        save_steps=8,
        report_to="none",
        use_cpu=True,  # drop it to train on a GPU
    )
    return Trainer(
        model,
        arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        optimizer_cls_and_kwargs=optimizer_of(choice, arguments),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("optimizer", nargs="?", default="paged_adamw8bit")
    parser.add_argument("--out", type=Path, default=Path("outputs/hf_trainer"))
    args = parser.parse_args()

    trainer = make_trainer(args.optimizer, args.out)
    trainer.train()

    resumed = make_trainer(args.optimizer, args.out)
    resumed.train(resume_from_checkpoint=str(args.out / "checkpoint-8"))

    losses = [
        [log["loss"] for log in run.state.log_history if "loss" in log]
        for run in (trainer, resumed)
    ]
    print("loss:", *(f"{loss:.4f}" for loss in losses[0]))
    print("resumed at step 8, the same losses:", losses[1] == losses[0])
    print(trainer.optimizer.optimizer.memory_report())  # the Trainer wraps the optimizer


if __name__ == "__main__":
    main()
