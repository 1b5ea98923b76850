"""The words of the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from optfactory import __version__
from optfactory.cli import catalog, explain, tools

_SOURCE_HELP = "a name, or a YAML file: an optimizer's config, or an app's with the key 'optimizer'"
_OVERRIDES_HELP = "overrides as in a Hydra app: lr=3e-4 betas=[0.9,0.95] ~eps"
_MODEL_HELP = "a function or class that returns the model; it runs on the meta device"

_Commands = argparse._SubParsersAction  # a name for what argparse does not export


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the words; `command` is the function to call, `json` whether to print JSON."""
    parser = command_line()
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command is tools.bench:
        arguments.words = rest
        return arguments
    # argparse closes a list of words at the first option: here `k=v` may follow `--json`.
    if rest and ("overrides" not in arguments or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides += rest
    return arguments


def command_line() -> argparse.ArgumentParser:
    """The parser of all commands; `bench` has one of its own."""
    parser = argparse.ArgumentParser(
        prog="optfactory", description="Optimizers for PyTorch, chosen by a name in a config."
    )
    parser.add_argument("--version", action="version", version=f"optfactory {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_catalog(commands)
    _add_plan(commands)
    _add_explain(commands)
    _add(commands, "doctor", tools.doctor, "look for what is missing or broken on this machine")
    bench = commands.add_parser("bench", add_help=False, help="time the optimizers on this machine")
    bench.set_defaults(command=tools.bench, json=False)
    return parser


def _add_catalog(commands: _Commands[argparse.ArgumentParser]) -> None:
    listing = _add(commands, "list", catalog.list_names, "list the optimizers")
    listing.add_argument("glob", nargs="?", default="", metavar="GLOB", help="such as '*8bit'")

    show = _add(commands, "show", catalog.show, "print the full config of an optimizer")
    check = _add(commands, "check", catalog.check, "validate a config")
    for subparser in (show, check):
        _add_source(subparser)

    copy = _add(commands, "copy", catalog.copy, "copy an optimizer's or rules' YAML into a folder")
    copy.add_argument("name", metavar="NAME", help="an optimizer, or rules for param groups")
    copy.add_argument("folder", metavar="DIR", help="such as conf/optimizer; made if missing")
    copy.add_argument("--force", action="store_true", help="replace a file that is there")

    schema = _add(commands, "schema", catalog.schema, "print the JSON Schema of optimizer configs")
    schema.add_argument("name", nargs="?", metavar="NAME", help="of this optimizer alone")

    configs = _add(commands, "configs", catalog.configs, "generate the YAML files in configs/")
    action = configs.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", action="store_true", help="bring the files up to date")
    action.add_argument("--check", action="store_true", help="exit with 1 if a file is out of date")


def _add_plan(commands: _Commands[argparse.ArgumentParser]) -> None:
    plan = _add(commands, "plan", tools.plan, "what training a model will need, before it starts")
    _add_source(plan)
    plan.add_argument(
        "--model",
        required=True,
        metavar="PKG.MOD:FACTORY",
        help=_MODEL_HELP,
    )
    _add_place(plan)
    plan.add_argument("--memory", metavar="SIZE", help="what the device has, such as 24GiB")
    plan.add_argument("--mesh", metavar="RANKS", help="shard over so many ranks, such as 8 or 2x4")
    plan.add_argument(
        "--shard",
        metavar="fsdp|hsdp|tp",
        help="fsdp: all tensors along their first dimension; hsdp: so over the second dimension of "
        "the mesh; tp: matrices along their first over the last (default: fsdp, with 2x4 hsdp)",
    )
    plan.add_argument(
        "--names", default="", metavar="GLOB,...", help="compare with these names (default: all)"
    )
    plan.add_argument("--plot", metavar="FILE", help="draw all names as stacked bars")
    plan.add_argument("--html", metavar="FILE", help="write it as one page for browsers")


def _add_explain(commands: _Commands[argparse.ArgumentParser]) -> None:
    told = _add(
        commands,
        "explain",
        explain.explain,
        "a config line by line: sources, param groups, schedule",
    )
    _add_source(told)
    told.add_argument("--model", metavar="PKG.MOD:FACTORY", help=_MODEL_HELP)
    _add_place(told)
    told.add_argument(
        "--scheduler",
        metavar="NAME|PATH",
        help="of torch.optim.lr_scheduler, or a dotted path to what takes the optimizer first "
        "(default: the app's node 'scheduler' or 'lr_scheduler'; none: without it)",
    )
    told.add_argument(
        "--scheduler-arg",
        action="append",
        default=[],
        metavar="k=v",
        help="an argument of the scheduler, or a YAML mapping of them; may be repeated",
    )
    told.add_argument("--steps", type=int, metavar="N", help="of the scheduler")
    told.add_argument("--plot", metavar="FILE", help="draw the learning rate of each group")


def _add_place(subparser: argparse.ArgumentParser) -> None:
    subparser.add_argument("--device", help="where the model will be, such as cuda (default: cpu)")
    subparser.add_argument("--dtype", choices=tools.DTYPES, help="convert the model's parameters")


def _add_source(subparser: argparse.ArgumentParser) -> None:
    subparser.add_argument("source", metavar="NAME|FILE", help=_SOURCE_HELP)
    subparser.add_argument("overrides", nargs="*", metavar="k=v", help=_OVERRIDES_HELP)


def _add(
    commands: _Commands[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary, description=summary)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(command=run)
    return parser
