"""Commands about names and configs: list, show, check, copy, schema, configs. None loads torch."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from optfactory.catalog.overrides import UsageError, read_config
from optfactory.cli.output import print_json
from optfactory.factory import resolve
from optfactory.registry import get_optimizer_info, list_optimizers


def list_names(arguments: argparse.Namespace) -> int:
    """`optfactory list`."""
    names = list_optimizers(arguments.glob)
    if arguments.json:
        print_json([_row(name) for name in names])
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


def show(arguments: argparse.Namespace) -> int:
    """`optfactory show`."""
    # Deferred like Hydra: only few commands need a YAML writer.
    from optfactory.catalog.files import render

    config = resolve(read_config(arguments.source, arguments.overrides))
    if arguments.json:
        print_json(config.model_dump(mode="json"))
    else:
        print(render(config), end="")
    return 0


def check(arguments: argparse.Namespace) -> int:
    """`optfactory check`."""
    config = resolve(read_config(arguments.source, arguments.overrides))
    if arguments.json:
        print_json({"valid": True, "config": config.model_dump(mode="json")})
    else:
        print(f"{arguments.source}: valid config for optimizer '{config.name}'")
    return 0


def copy(arguments: argparse.Namespace) -> int:
    """`optfactory copy`."""
    from optfactory.catalog.files import shipped_text

    name, text = shipped_text(arguments.name)
    target = Path(arguments.folder, f"{name}.yaml")
    try:
        if target.exists() and not arguments.force:
            raise UsageError(f"{target} is there already; give --force to replace it")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {target}: {error.strerror}") from error
    if arguments.json:
        print_json({"file": str(target)})
    else:
        print(f"wrote {target}")
    return 0


def schema(arguments: argparse.Namespace) -> int:
    """`optfactory schema`; JSON with and without `--json`."""
    from optfactory.catalog.json_schema import all_names, one_name

    print_json(one_name(arguments.name) if arguments.name else all_names())
    return 0


def configs(arguments: argparse.Namespace) -> int:
    """`optfactory configs`."""
    from optfactory.catalog.files import check_files, config_folder, write_files

    folder = config_folder()
    if arguments.write:
        changed = write_files(folder)
        if arguments.json:
            print_json({"changed": changed})
        else:
            print(f"{len(changed)} file(s) changed in {folder}")
        return 0
    problems = check_files(folder)
    if arguments.json:
        print_json({"problems": problems})
    elif problems:
        print(*problems, "run: optfactory configs --write", sep="\n", file=sys.stderr)
    else:
        print(f"all files in {folder} are up to date")
    return 1 if problems else 0
