r"""Train the same model with every optimizer, and compare final loss and bytes of state.

    python examples/sweep.py                                  # eighteen runs, two minutes each
    python examples/sweep.py --names '*8bit' -- steps=100          # overrides of train_lm.py
    python examples/sweep.py --from examples/results/sweep.json --plot sweep.pdf

What the README shows is made by

    cd examples && python sweep.py --json results/sweep.json --plot results/sweep.png \
        --markdown ../README.md

The runs are a Hydra multirun of `train_lm.py`: `-m 'optimizer=glob(*)'` does the same by hand.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from lm.comparison import find_markers, markdown, plot, write_between_markers

HERE = Path(__file__).parent


def train_all(names: str, overrides: list[str], folder: Path) -> list[dict[str, Any]]:
    """The metrics of one run for each optimizer that a glob matches."""
    command = [sys.executable, str(HERE / "train_lm.py"), "-m", f"optimizer=glob({names})"]
    subprocess.run([*command, f"hydra.sweep.dir={folder}", *overrides], check=True)
    files = sorted(folder.glob("*/metrics.json"))
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    keys = ("optimizer", "val_loss", "state_bytes", "parameters", "unigram_loss")
    runs = [{key: run[key] for key in keys} for run in runs]
    return sorted(runs, key=lambda run: str(run["optimizer"]))


def main() -> None:
    """Train, or read what was trained; write what the options ask for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--names", default="*", metavar="GLOB", help="which optimizers")
    parser.add_argument("--from", dest="source", type=Path, metavar="FILE", help="train nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw them")
    parser.add_argument("--markdown", type=Path, metavar="FILE.md", help="put the table there")
    parser.add_argument("overrides", nargs="*", metavar="k=v", help="for train_lm.py")
    arguments = parser.parse_args()
    if arguments.markdown:
        try:
            find_markers(arguments.markdown)  # before the work
        except (OSError, ValueError) as error:
            parser.error(str(error))
    if arguments.source:
        runs = json.loads(arguments.source.read_text(encoding="utf-8"))
    else:
        with tempfile.TemporaryDirectory() as folder:
            runs = train_all(arguments.names, arguments.overrides, Path(folder))
    if not runs:
        parser.error(f"no optimizer matches {arguments.names!r}; see optfactory list")
    print(markdown(runs), end="")
    if arguments.json:
        arguments.json.write_text(json.dumps(runs, indent=2) + "\n", encoding="utf-8")
    if arguments.plot:
        plot(runs, arguments.plot)
    if arguments.markdown:
        write_between_markers(arguments.markdown, markdown(runs))


if __name__ == "__main__":
    main()
