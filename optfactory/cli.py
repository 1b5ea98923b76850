"""The command `optfactory`: list, show, check, configs, bench.

Exit codes: 0 all is well, 1 an invalid config (or drifted config files), 2 wrong usage. Results go
to stdout, errors to stderr; both are JSON with `--json`. Nothing here loads torch, but for `bench`,
which reads its own options and whose `--json` names a file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence

from optfactory import __version__
from optfactory.config_input import UsageError, read_config
from optfactory.errors import OptFactoryError
from optfactory.factory import resolve
from optfactory.registry import get_optimizer_info, list_optimizers

_SOURCE_HELP = "a name, or a YAML file: an optimizer's config, or an app's with the key 'optimizer'"
_OVERRIDES_HELP = "overrides as in a Hydra app: lr=3e-4 betas=[0.9,0.95] ~eps"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; argparse itself exits with 2 on wrong usage."""
    arguments = _parse(argv)
    command: Callable[[argparse.Namespace], int] = arguments.command
    try:
        return command(arguments)
    except OptFactoryError as error:
        _report(error, arguments.json)
        return 2 if isinstance(error, UsageError) else 1


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command is _bench:
        arguments.words = rest
        return arguments
    # argparse closes a list of words at the first option: here `k=v` may follow `--json`.
    if rest and ("overrides" not in arguments or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides += rest
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="optfactory", description="Optimizers for PyTorch, chosen by a name in a config."
    )
    parser.add_argument("--version", action="version", version=f"optfactory {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    listing = _add_command(commands, "list", _list, "list the optimizers")
    listing.add_argument("glob", nargs="?", default="", metavar="GLOB", help="such as '*8bit'")

    show = _add_command(commands, "show", _show, "print the full config of an optimizer")
    check = _add_command(commands, "check", _check, "validate a config")
    for subparser in (show, check):
        subparser.add_argument("source", metavar="NAME|FILE", help=_SOURCE_HELP)
        subparser.add_argument("overrides", nargs="*", metavar="k=v", help=_OVERRIDES_HELP)

    configs = _add_command(commands, "configs", _configs, "generate the YAML files in configs/")
    action = configs.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", action="store_true", help="bring the files up to date")
    action.add_argument("--check", action="store_true", help="exit with 1 if a file is out of date")

    bench = commands.add_parser("bench", add_help=False, help="time the optimizers on this machine")
    bench.set_defaults(command=_bench, json=False)
    return parser


def _add_command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary, description=summary)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(command=run)
    return parser


def _list(arguments: argparse.Namespace) -> int:
    names = list_optimizers(arguments.glob)
    if arguments.json:
        _print_json([_row(name) for name in names])
        return 0
    if not names:
        print(f"no optimizer matches '{arguments.glob}'", file=sys.stderr)
    width = max(map(len, names), default=0)
    for name in names:
        print(f"{name:<{width}}  {get_optimizer_info(name).description}")
    return 0


def _row(name: str) -> dict[str, object]:
    info = get_optimizer_info(name)
    return {
        "name": info.name,
        "family": info.family,
        "optim_bits": info.optim_bits,
        "is_paged": info.is_paged,
        "description": info.description,
        "aliases": list(info.aliases),
    }


def _show(arguments: argparse.Namespace) -> int:
    # Deferred like Hydra: only this command and `configs` need a YAML writer.
    from optfactory.config_files import render

    config = resolve(read_config(arguments.source, arguments.overrides))
    if arguments.json:
        _print_json(config.model_dump(mode="json"))
    else:
        print(render(config), end="")
    return 0


def _check(arguments: argparse.Namespace) -> int:
    config = resolve(read_config(arguments.source, arguments.overrides))
    if arguments.json:
        _print_json({"valid": True, "config": config.model_dump(mode="json")})
    else:
        print(f"{arguments.source}: valid config for optimizer '{config.name}'")
    return 0


def _configs(arguments: argparse.Namespace) -> int:
    from optfactory.config_files import check_files, config_folder, write_files

    folder = config_folder()
    if arguments.write:
        changed = write_files(folder)
        if arguments.json:
            _print_json({"changed": changed})
        else:
            print(f"{len(changed)} file(s) changed in {folder}")
        return 0
    problems = check_files(folder)
    if arguments.json:
        _print_json({"problems": problems})
    elif problems:
        print(*problems, "run: optfactory configs --write", sep="\n", file=sys.stderr)
    else:
        print(f"all files in {folder} are up to date")
    return 1 if problems else 0


def _bench(arguments: argparse.Namespace) -> int:
    # Deferred: only this command measures anything.
    from optfactory.bench.command import run

    return run(arguments.words)


def _report(error: OptFactoryError, as_json: bool) -> None:
    if as_json:
        problems = list(getattr(error, "problems", ()))
        detail = {"type": type(error).__name__, "message": str(error), "problems": problems}
        print(json.dumps({"error": detail}, indent=2), file=sys.stderr)
    else:
        print(f"error: {error}", file=sys.stderr)


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2))


if __name__ == "__main__":
    sys.exit(main())
