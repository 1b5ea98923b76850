r"""Train the same model with every optimizer, and compare final loss and bytes of state.

    python examples/sweep.py                                  # thirty runs, some seconds each
    python examples/sweep.py --names '*8bit' -- steps=100          # overrides of train_lm.py
    python examples/sweep.py --seeds 1 -- model.width=192 model.depth=3 batch=24 context=96
    python examples/sweep.py --from examples/results/sweep.json --plot sweep.pdf

What docs/pages/explanation/training-runs.md shows is made by

    cd examples && python sweep.py --json results/sweep.json \
        --plot ../docs/pages/pictures/sweep.png \
        --markdown ../docs/pages/explanation/training-runs.md
    python sweep.py --names '[adamw8bit,muon8bit]' --json results/curves.json \
        --curves ../docs/pages/pictures/curves.png -- eval_every=20

The runs are Hydra multiruns of `train_lm.py`: `-m 'optimizer=glob(*)'` does the same by hand. The
model is smaller than that script's. Names that end the first seed with the same bits (paged or not)
would do so with the others too, and only one of them is trained with these.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lm.comparison import (
    find_markers,
    markdown,
    plot,
    plot_curves,
    plot_families,
    same_results,
    write_between_markers,
)

HERE = Path(__file__).parent


SMALL = ("model.width=96", "model.depth=2", "model.heads=4", "batch=16", "context=64", "steps=300")
KEYS = (
    *("optimizer", "seed", "val_loss", "state_bytes", "parameters", "unigram_loss"),
    *("model", "device"),
)
OF_CURVES = ("lr", "val_curve")  # kept for curves only: they are long


def train_all(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """The metrics of a run for each optimizer that a glob matches, and for each seed."""
    keys = KEYS + OF_CURVES * bool(arguments.curves or arguments.families)
    overrides, seeds = arguments.overrides, range(1, arguments.seeds)
    runs = train(f"glob({arguments.names})", [0], overrides, folder / "first", keys)
    if runs and seeds:
        one_each = ",".join(same[0] for same, _ in same_results(runs))
        runs += train(one_each, seeds, overrides, folder / "others", keys)
    return runs


def train(
    names: str, seeds: Iterable[int], overrides: list[str], folder: Path, keys: Iterable[str]
) -> list[dict[str, Any]]:
    """The metrics of one multirun, by seed and name."""
    command = [sys.executable, str(HERE / "train_lm.py"), "-m", f"optimizer={names}"]
    command += [f"seed={','.join(map(str, seeds))}", f"hydra.sweep.dir={folder}"]
    subprocess.run([*command, *SMALL, *overrides], check=True)
    files = sorted(folder.glob("*/metrics.json"))
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    runs = [{key: run[key] for key in keys} for run in runs]
    return sorted(runs, key=lambda run: (run["seed"], run["optimizer"]))


def read_arguments() -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    """The options, checked before the work, and the parser for errors that show later."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--names", default="*", metavar="GLOB", help="which optimizers; or [A,B]")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="train with this many")
    parser.add_argument("--from", dest="source", type=Path, metavar="FILE", help="train nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw them")
    parser.add_argument("--curves", type=Path, metavar="FILE.png", help="draw loss against step")
    parser.add_argument(
        "--families", type=Path, metavar="FILE.png", help="the same, a panel for each family"
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE.md", help="put the table there")
    parser.add_argument("overrides", nargs="*", metavar="k=v", help="for train_lm.py")
    arguments = parser.parse_args()
    if arguments.seeds < 1:
        parser.error("--seeds must be at least 1")
    if arguments.markdown:
        try:
            find_markers(arguments.markdown)  # before the work
        except (OSError, ValueError) as error:
            parser.error(str(error))
    return arguments, parser


def main() -> None:
    """Train, or read what was trained; write what the options ask for."""
    arguments, parser = read_arguments()
    if arguments.source:
        runs = json.loads(arguments.source.read_text(encoding="utf-8"))
    else:
        with tempfile.TemporaryDirectory() as folder:
            runs = train_all(arguments, Path(folder))
    if not runs:
        parser.error(f"no optimizer matches {arguments.names!r}; see optfactory list")
    draws_curves = arguments.curves or arguments.families
    if draws_curves and not all(run.keys() >= set(OF_CURVES) for run in runs):
        parser.error(f"{arguments.source} has no curves; train with --curves to keep them")
    print(markdown(runs), end="")
    if arguments.json:
        arguments.json.write_text(json.dumps(runs, indent=2) + "\n", encoding="utf-8")
    if arguments.plot:
        plot(runs, arguments.plot)
    if arguments.curves:
        plot_curves(runs, arguments.curves)
    if arguments.families:
        plot_families(runs, arguments.families)
    if arguments.markdown:
        write_between_markers(arguments.markdown, markdown(runs))


if __name__ == "__main__":
    main()
