"""What the width of state costs: final losses of every optimizer at every width, as a table.

    python widths.py                                            # the table, some ten minutes
    python widths.py --families adamw lion --steps 500
    python widths.py --json results/widths.json --markdown ../docs/pages/how-to/widths.md

A model of four matrices learns which token follows two others in a language whose least loss is
known, 2000 steps of 64 with a learning rate that falls to 0, on one thread. All runs of a family
begin with the same numbers and see the same batches.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from optfactory import build_optimizer, get_optimizer_info, list_optimizers
from optfactory.config.names import WIDTHS
from optfactory.config.schema import family_class

STEPS, BATCH, LAST = 2000, 64, 200
TOKENS, WIDTH, HIDDEN = 64, 64, 128
# Learning rates at which runs begin, where three times the default is none.
PEAKS = {"sgd": 0.1, "lamb": 1e-2, "ademamix": 1e-3}
PEAKS |= dict.fromkeys(("adabelief", "adan", "adopt", "nadam", "radam", "rmsprop"), 3e-3)
BEGIN, END = "<!-- widths -->", "<!-- /widths -->"


@dataclass(frozen=True)
class Run:
    """One training run: its mean loss over the last steps, and the bytes of its state."""

    family: str
    width: str
    loss: float
    state_bytes: int


@cache
def language(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Batches of two tokens and the one that follows, and the least loss there is on each batch.

    A token follows two others with fixed chances; frequencies of tokens fall as in languages.
    """
    generator = torch.Generator().manual_seed(seed)
    first, second = (2 * torch.randn(TOKENS, TOKENS, generator=generator) for _ in range(2))
    chances = torch.softmax(first[:, None] + second[None], dim=-1)
    frequency = 1 / torch.arange(1.0, TOKENS + 1)
    a, b = torch.multinomial(frequency, 2 * STEPS * BATCH, True, generator=generator).view(2, -1)
    y = torch.multinomial(chances[a, b], 1, generator=generator)[:, 0]
    least = -chances[a, b, y].log().view(STEPS, BATCH).mean(dim=1)
    return torch.stack([a, b, y]).view(3, STEPS, BATCH), least


def model(seed: int = 0) -> list[Tensor]:
    """Two embeddings, a hidden layer and an output layer: four matrices large enough for codes."""
    generator = torch.Generator().manual_seed(seed)
    matrices = [(0.5, TOKENS, WIDTH), (0.5, TOKENS, WIDTH), (0.12, HIDDEN, WIDTH)]
    matrices.append((0.09, TOKENS, HIDDEN))
    params = [size * torch.randn(*shape, generator=generator) for size, *shape in matrices]
    params += [torch.zeros(HIDDEN), torch.zeros(TOKENS)]
    return [p.requires_grad_() for p in params]


def loss_of(params: Sequence[Tensor], batch: Tensor) -> Tensor:
    """Mean cross entropy."""
    first, second, hidden, out, hidden_bias, out_bias = params
    x = F.gelu(F.linear(first[batch[0]] + second[batch[1]], hidden, hidden_bias))
    return F.cross_entropy(F.linear(x, out, out_bias), batch[2])


def trained(
    name: str, peak: float, steps: int = STEPS, **asked: object
) -> tuple[Tensor, list[Tensor], torch.optim.Optimizer]:
    """Losses of every step, the parameters, and the optimizer, with a rate that falls to 0."""
    torch.set_num_threads(1)
    batches, _ = language()
    params = model()
    optimizer = build_optimizer(name, params, lr=peak, **asked)
    losses = torch.zeros(steps)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = peak * (1 - step / STEPS)
        loss = loss_of(params, batches[:, step])
        for p, g in zip(params, torch.autograd.grad(loss, params), strict=True):
            p.grad = g
        optimizer.step()
        losses[step] = loss.detach()
    return losses, params, optimizer


@contextmanager
def coarse_widths_too(family: str) -> Iterator[None]:
    """Within, a family may have widths that are too coarse for it."""
    base = family_class(get_optimizer_info(family).config_class)
    refused = base.too_coarse
    base.too_coarse = {}
    try:
        yield
    finally:
        base.too_coarse = refused


def run(family: str, width: str, peak: float, steps: int = STEPS) -> Run:
    """Train with one optimizer at one width, whether or not there is a name for it."""
    with coarse_widths_too(family):
        losses, _, optimizer = trained(family, peak, steps, **WIDTHS[width])
    report = optimizer.memory_report()  # type: ignore[attr-defined]
    return Run(family, width, float(losses[-LAST:].mean()), report.state_bytes)


def table(runs: Sequence[Run]) -> list[str]:
    """A row for each family: its loss at 32 bits, and by how many percent others are off it."""
    widths = list(WIDTHS)[:-1]
    lines = [
        "| | loss at 32 bits | " + " | ".join(f"{width}, % off" for width in widths) + " |",
        "|---" * (len(widths) + 2) + "|",
    ]
    by_family: dict[str, dict[str, float]] = {}
    for item in runs:
        by_family.setdefault(item.family, {})[item.width] = item.loss
    for family, losses in by_family.items():
        wide, coarse = losses["32bit"], get_optimizer_info(family).config_class.too_coarse
        cells = []
        for width in widths:
            off = f"{100 * (losses[width] / wide - 1):+.2f}" if width in losses else ""
            cells.append(f"{off} (no name)" if width in coarse else off)
        lines.append(f"| {family} | {wide:.4f} | {' | '.join(cells)} |")
    return lines


def write_between(path: Path, lines: Sequence[str]) -> None:
    """Replace what stands between the marks of a file."""
    head, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, _, tail = rest.partition(END)
    path.write_text(f"{head}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{tail}", encoding="utf-8")


def main() -> None:
    """Train, and show or write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    known = sorted({get_optimizer_info(name).family for name in list_optimizers()})
    parser.add_argument("--families", nargs="+", default=known, choices=known)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path, help=f"a file with the lines {BEGIN} and {END}")
    given = parser.parse_args()
    jobs = [(family, width) for family in given.families for width in WIDTHS]
    peaks = [PEAKS.get(f, 3 * get_optimizer_info(f).defaults["lr"]) for f, _ in jobs]
    with ProcessPoolExecutor(given.processes, mp_context=get_context("spawn")) as pool:
        runs = list(pool.map(run, *zip(*jobs, strict=True), peaks, [given.steps] * len(jobs)))
    lines = table(runs)
    print("\n".join(lines))
    if given.json:
        least = float(language()[1][-LAST:].mean())
        facts = {"steps": given.steps, "least_loss": least, "torch": torch.__version__}
        figures = [vars(item) for item in runs]
        given.json.write_text(json.dumps({**facts, "runs": figures}, indent=1) + "\n")
    if given.markdown:
        write_between(given.markdown, lines)


if __name__ == "__main__":
    main()
