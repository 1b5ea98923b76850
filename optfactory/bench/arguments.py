"""The words behind `optfactory bench`. Loads no torch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from optfactory.bench.cases import CASES, DTYPES
from optfactory.bench.markdown import BEGIN, END, STDOUT, holds_markers

PARTS = ("time", "memory", "startup")
PICTURES = (".png", ".pdf", ".svg")

_DESCRIPTION = """\
Time the steps of optimizers on this machine, beside torch's AdamW and the memory's bandwidth.

    optfactory bench                                 adamw, adamw8bit, lamb, lamb8bit; minutes
    optfactory bench '*adamw*' --cases large --seconds 10
    optfactory bench --peers --dtype float32,bfloat16 --json figures.json --plot figures.png
    optfactory bench --device cuda --peers --json figures.json
    optfactory bench --from figures.json --markdown speed.md

Every optimizer is alternated with torch.optim.AdamW(fused=True) on the same tensors, step by step,
so that both meet the same machine. ms, ns and 'x fused' are medians, the last of the ratios of
neighboring steps; 'best' is the ratio of the two fastest steps, which other load on the machine
disturbs least. 'x limit' is the time as a multiple of the least memory traffic of such a step over
the best bandwidth seen in the run. On a GPU ms is the device's time, 'host ms' the time until a
step returns.
"""
_CASES_HELP = f"some of {','.join(CASES)}; default: large,gpt2,small, on GPUs "


@dataclass(frozen=True)
class Defaults:
    """What is measured on a kind of device where the command line does not say."""

    names: tuple[str, ...]
    cases: tuple[str, ...]
    dtypes: tuple[str, ...]
    seconds: float
    least_pairs: int
    startup: tuple[str, ...]


DEFAULTS = {
    "cpu": Defaults(
        names=("adamw", "adamw8bit", "lamb", "lamb8bit"),
        cases=("large", "gpt2", "small"),
        dtypes=("float32",),
        seconds=40.0,
        least_pairs=5,
        startup=("adamw", "adamw8bit", "lamb", "lamb8bit"),
    ),
    "cuda": Defaults(
        names=(
            *("adam", "adamw", "lamb", "adam8bit", "adamw8bit", "lamb8bit"),
            *("paged_adamw:pinned", "paged_adamw8bit:pinned", "paged_adamw8bit:managed"),
        ),
        cases=("1m", "100m", "1b", "llama7b", "small2000"),
        dtypes=("float32", "bfloat16"),
        seconds=12.0,
        least_pairs=10,
        startup=("adamw8bit", "lamb8bit"),
    ),
}


@dataclass(frozen=True)
class Settings:
    """What to measure and where to write it.

    Attributes:
        names: words for optimizers, as given; empty: the device's default.
        seconds: time for the steps of one case and dtype, all optimizers together.
        least_pairs: steps of each optimizer that are measured however long they take.
    """

    names: tuple[str, ...]
    device: str
    cases: tuple[str, ...]
    dtypes: tuple[str, ...]
    parts: tuple[str, ...]
    peers: bool
    threads: int | None
    seconds: float
    least_pairs: int
    quick: bool
    json: Path | None
    plot: Path | None
    markdown: Path | None
    source: Path | None


def parse(words: Sequence[str]) -> Settings:
    """Read the command line; argparse exits with 2 on wrong usage, before anything is measured."""
    parser = command_line()
    given = parser.parse_intermixed_args(words)
    problem = _measuring_problem(given) or _files_problem(given)
    if problem:
        parser.error(problem)
    return _settings(given, given.device or "cpu")


def _measuring_problem(given: argparse.Namespace) -> str:
    """Why these words cannot be obeyed together; empty if they can."""
    on_cpu = given.device != "cuda"
    if given.source:
        measuring = ("names", "device", "cases", "dtype", "parts", "threads", "seconds")
        asked = [key for key in (*measuring, "peers", "quick") if getattr(given, key)]
        if asked:
            return f"--from shows figures of an earlier run; leave out {', '.join(asked)}"
    if on_cpu and any(":" in name for name in given.names):
        return "NAME:managed and NAME:pinned are for --device cuda"
    if given.quick and (given.cases or given.seconds):
        return "--quick chooses cases and seconds itself"
    if "memory" in (given.parts or ()) and not (on_cpu and sys.platform == "linux"):
        return "--parts memory: a process's peak memory can be measured on Linux CPUs only"
    if given.plot and given.parts and "time" not in given.parts:
        return "--plot draws step times; add time to --parts"
    return ""


def _files_problem(given: argparse.Namespace) -> str:
    """Why the files cannot be written; empty if they can."""
    for path in (given.json, given.plot, given.markdown):
        if path and path != STDOUT and not path.parent.is_dir():
            return f"no such folder: {path.parent}"
    if given.plot and given.plot.suffix not in PICTURES:
        return f"--plot: the file's name must end in {', '.join(PICTURES)}"
    if given.markdown not in (None, STDOUT) and not holds_markers(given.markdown):
        return f"--markdown: {given.markdown} has no lines {BEGIN} and {END}"
    return ""


def _settings(given: argparse.Namespace, device: str) -> Settings:
    defaults = DEFAULTS[device]
    return Settings(
        names=tuple(given.names),
        device=device,
        cases=("tiny",) if given.quick else given.cases or defaults.cases,
        dtypes=given.dtype or defaults.dtypes,
        parts=given.parts or ("time",),
        peers=given.peers,
        threads=given.threads,
        seconds=0.0 if given.quick else given.seconds or defaults.seconds,
        least_pairs=2 if given.quick else defaults.least_pairs,
        quick=given.quick,
        json=given.json,
        plot=given.plot,
        markdown=given.markdown,
        source=given.source,
    )


def command_line() -> argparse.ArgumentParser:
    """The parser of `optfactory bench`."""
    parser = argparse.ArgumentParser(
        prog="optfactory bench",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="optimizers of optfactory, or globs: '*8bit'")
    add("--device", choices=DEFAULTS, help="default: cpu")
    add(
        "--cases",
        type=_some_of(CASES),
        metavar="CASE,...",
        help=_CASES_HELP + ",".join(DEFAULTS["cuda"].cases),
    )
    add(
        "--dtype",
        type=_some_of(DTYPES),
        metavar="DTYPE,...",
        help=f"of parameters and gradients: some of {','.join(DTYPES)}",
    )
    add("--peers", action="store_true", help="bitsandbytes, torchao and timm too, where installed")
    add("--seconds", type=_positive(float), help="for each case and dtype; default: 40, GPUs 12")
    add("--threads", type=_positive(int), help="default: torch's own choice")
    add(
        "--parts",
        type=_some_of(PARTS),
        metavar="PART,...",
        help="time (the default), memory (peak of a step), startup (cost of the first step)",
    )
    add("--quick", action="store_true", help="tiny sizes to try the command; figures mean nothing")
    _add_files(parser)
    return parser


def _add_files(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--json", type=Path, metavar="FILE", help="write machine and figures")
    add("--plot", type=Path, metavar="FILE.png", help="draw ns/param with the memory limit")
    add(
        "--markdown",
        type=Path,
        metavar="FILE.md",
        help="write the tables between the lines <!-- bench --> and <!-- /bench --> of a file, "
        "or into a new one; -: print them",
    )
    add("--from", type=Path, metavar="FILE.json", dest="source", help="show these, measure nothing")


def _some_of(allowed: Collection[str]) -> Callable[[str], tuple[str, ...]]:
    def read(text: str) -> tuple[str, ...]:
        words = tuple(dict.fromkeys(text.split(",")))
        wrong = [word for word in words if word not in allowed]
        if wrong:
            raise argparse.ArgumentTypeError(
                f"{', '.join(map(repr, wrong))} unknown; choose from {','.join(allowed)}"
            )
        return words

    return read


def _positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = kind(0)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
        return value

    return read
