"""Train on a changing number of processes, and compare with one that trained all the way.

    python examples/resharding.py                                       # adamw8bit, a minute
    python examples/resharding.py muon8bit --processes 1,2,1 --steps 20 --plot resharding.png

Each phase starts processes anew, shards the model over them (FSDP2), reads the checkpoint that the
phase before saved from other processes, trains, and saves (Distributed Checkpoint). For contrast, a
third run does the same and loses the optimizer's state in each change. All processes see the whole
batch, so that gradients are those of one process, which is not sharded; then so are parameters and
losses, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
import torch.nn.functional as F
from lm.data import Corpus, random_batch
from lm.model import CharTransformer
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer

from optfactory import build_optimizer

CONTEXT, BATCH = 32, 16
ALONE, WHOLE, LOST = "one process", "resharded", "resharded, state lost"


def phase(rank: int, count: int, settings: dict[str, Any]) -> None:
    """One process of a phase: some steps of both resharded runs; the first writes their losses."""
    folder, first = Path(settings["folder"]), settings["first"]
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / f"store-{first}"), count)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count)
    mesh = init_device_mesh("cpu", (count,))
    losses = {}
    for run in (WHOLE, LOST):
        model, corpus = model_and_text()
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer = build_optimizer(settings["name"], model, lr=settings["lr"])
        if first:
            load(str(folder / run / str(first)), model, optimizer, run == LOST)
        last = first + settings["steps"]
        losses[run] = [train_step(model, optimizer, corpus, step) for step in range(first, last)]
        dcp.save(state_of(model, optimizer), checkpoint_id=str(folder / run / str(last)))
    if rank == 0:
        (folder / f"losses-{first}.json").write_text(json.dumps(losses), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def model_and_text() -> tuple[CharTransformer, Corpus]:
    """The same in every run."""
    corpus = Corpus.load(None, 400_000, CONTEXT)
    torch.manual_seed(0)
    return CharTransformer(corpus.vocab_size, CONTEXT, width=64, depth=2, heads=4), corpus


def state_of(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """What is saved."""
    return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))


def load(checkpoint: str, model: nn.Module, optimizer: Optimizer, loses_state: bool) -> None:
    """Read what other processes have saved."""
    saved = state_of(model, optimizer)
    if loses_state:
        del saved["optimizer"]
    dcp.load(saved, checkpoint_id=checkpoint)
    set_model_state_dict(model, saved["model"])
    if not loses_state:
        set_optimizer_state_dict(model, optimizer, saved["optimizer"])


def train_step(model: nn.Module, optimizer: Optimizer, corpus: Corpus, step: int) -> float:
    """One update; returns the loss before it."""
    batches = torch.Generator().manual_seed(step)
    inputs, targets = random_batch(corpus.train, BATCH, CONTEXT, batches)
    loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def all_runs(name: str, lr: float, counts: list[int], steps: int) -> dict[str, list[float]]:
    """The losses of three runs; two have phases of these numbers of processes."""
    torch.set_num_threads(1)  # as the others have: sums of threads may be rounded otherwise
    model, corpus = model_and_text()
    optimizer = build_optimizer(name, model, lr=lr)
    alone = [train_step(model, optimizer, corpus, step) for step in range(steps * len(counts))]
    runs: dict[str, list[float]] = {ALONE: alone, WHOLE: [], LOST: []}
    with tempfile.TemporaryDirectory() as folder:
        for place, count in enumerate(counts):
            first = place * steps
            own = {"name": name, "lr": lr, "folder": folder, "first": first, "steps": steps}
            mp.spawn(phase, (count, own), nprocs=count)
            losses = Path(folder, f"losses-{first}.json").read_text(encoding="utf-8")
            for run, of_phase in json.loads(losses).items():
                runs[run] += of_phase
    return runs


def plot(
    runs: dict[str, list[float]], counts: list[int], steps: int, name: str, path: Path
) -> None:
    """Losses against steps, with the number of processes, and how far the runs are apart."""
    alone = runs[ALONE]
    style = {"font.size": 7, "axes.spines.top": False, "axes.spines.right": False}
    looks = {ALONE: ("#999999", "-", 3), WHOLE: ("#0072B2", "-", 1), LOST: ("#D55E00", "--", 1)}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(6, 3.6), layout="constrained")
        FigureCanvasAgg(figure)
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        for label, losses in runs.items():
            color, line, width = looks[label]
            upper.plot(losses, line, color=color, linewidth=width, label=label)
            if label != ALONE:
                apart = [a - b for a, b in zip(losses, alone, strict=True)]
                lower.plot(apart, line, color=color, linewidth=1)
        top = upper.get_ylim()[1]
        for place, count in enumerate(counts):
            for axes in (upper, lower):
                axes.axvline(place * steps, color="black", linewidth=0.5, linestyle=":")
            middle = (place + 0.5) * steps
            upper.text(middle, top, f"{count} process{'es' * (count > 1)}", ha="center", va="top")
        upper.set_ylabel("training loss (nats/char)")
        upper.set_title(f"{name}, sharded anew {len(counts) - 1} times", loc="left")
        upper.legend(frameon=False, loc="lower left")
        lower.set_ylabel("apart from one")
        lower.set_xlabel("step")
        figure.savefig(path, dpi=200)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", default="adamw8bit", help="an optimizer")
    parser.add_argument("--processes", default="1,2,4,2,1", metavar="N,...", help="in each phase")
    parser.add_argument("--steps", type=int, default=40, help="in each phase")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    arguments = parser.parse_args()
    counts = [int(count) for count in arguments.processes.split(",")]
    steps = arguments.steps
    runs = all_runs(arguments.name, arguments.lr, counts, steps)
    for label, losses in runs.items():
        apart = max(abs(a - b) for a, b in zip(losses, runs[ALONE], strict=True))
        print(f"{label}: last loss {losses[-1]:.4f}, at most {apart:.3g} from one process")
    if arguments.plot:
        plot(runs, counts, steps, arguments.name, arguments.plot)


if __name__ == "__main__":
    main()
