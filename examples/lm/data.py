"""Real text as character tokens: Python's own standard library, or any text file."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

UNKNOWN = 0  # every character too rare to deserve a token of its own
# Not the library's own prose and code: third-party packages, tests, and generated tables.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}


@dataclass(frozen=True)
class Corpus:
    """Training and validation text as 1-D int64 tensors of token numbers."""

    train: Tensor
    val: Tensor
    vocab_size: int
    source: str

    @classmethod
    def load(cls, data: str | None, max_bytes: int, context: int, min_count: int = 20) -> Corpus:
        """Read `data`, or the standard library; characters below `min_count` become UNKNOWN."""
        source = data or sysconfig.get_paths()["stdlib"]
        train_text, val_text = split_file(Path(data)) if data else split_stdlib(max_bytes)
        if min(len(train_text), len(val_text)) <= context:
            raise ValueError(f"{source}: too little text for windows of context={context}")
        train, val = code_points(train_text), code_points(val_text)
        counts = torch.bincount(train)
        frequent = (counts >= min_count).nonzero().flatten()
        token_of = torch.full((0x110000,), UNKNOWN)  # indexed by Unicode code point
        token_of[frequent] = torch.arange(1, len(frequent) + 1)
        return cls(token_of[train], token_of[val], len(frequent) + 1, source)

    def unigram_loss(self) -> float:
        """Validation loss in nats of the best model that ignores context: token frequencies."""
        counts = torch.bincount(self.train, minlength=self.vocab_size).double() + 1
        return -(counts / counts.sum()).log()[self.val].mean().item()


def split_stdlib(max_bytes: int) -> tuple[str, str]:
    """About `max_bytes` of the standard library's sources; every tenth file is for validation."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [
        file
        for file in sorted(root.rglob("*.py"))
        if SKIPPED_FOLDERS.isdisjoint(file.relative_to(root).parts)
    ]
    if not files:
        raise FileNotFoundError(f"no Python sources under {root}; give a text file: data=FILE")
    total = sum(file.stat().st_size for file in files)
    files = files[:: max(1, round(total / max_bytes))]
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    val = texts[9::10] or texts[-1:]
    return "".join(text for i, text in enumerate(texts) if i % 10 != 9), "".join(val)


def split_file(path: Path) -> tuple[str, str]:
    """The first nine tenths of a text file for training, the rest for validation."""
    text = path.read_text(encoding="utf-8", errors="replace")
    cut = len(text) * 9 // 10
    return text[:cut], text[cut:]


def code_points(text: str) -> Tensor:
    """The characters of `text` as Unicode code points."""
    raw = bytearray(text.encode("utf-32-le", errors="replace"))
    return torch.frombuffer(raw, dtype=torch.int32).long()


def windows(tokens: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets (the next characters), both [len(starts), context]."""
    block = tokens[starts[:, None] + torch.arange(context + 1)]
    return block[:, :-1], block[:, 1:]


def random_batch(
    tokens: Tensor, batch: int, context: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """`batch` windows at random places."""
    starts = torch.randint(len(tokens) - context, (batch,), generator=generator)
    return windows(tokens, starts, context)


def even_batches(
    tokens: Tensor, batches: int, batch: int, context: int
) -> list[tuple[Tensor, Tensor]]:
    """The same evenly spread windows every time, so that validation losses can be compared."""
    starts = torch.linspace(0, len(tokens) - context - 1, batches * batch).long()
    return [windows(tokens, part, context) for part in starts.split(batch)]
