"""The command `optfactory explain`; it loads torch when it runs."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optfactory.catalog.overrides import Source, UsageError, read_source
from optfactory.cli.output import print_json
from optfactory.cli.tools import picture_file, written
from optfactory.config.hydra_keys import INSTANTIATE_KEYS, TARGET
from optfactory.errors import ConfigError

if TYPE_CHECKING:
    from optfactory.explaining.schedules import Scheduler

_KEYS = ("scheduler", "lr_scheduler")  # of an app's config
_NONE = "none"


def explain(arguments: argparse.Namespace) -> int:
    """`optfactory explain`; exit code 1 if a rule matches nothing or the scheduler raises."""
    from optfactory.explaining.explanation import explained, read_steps
    from optfactory.explaining.sources import Given
    from optfactory.factory import resolve
    from optfactory.planning.memory_plan import read_device
    from optfactory.planning.model import load_model

    picture = None if arguments.plot is None else picture_file(arguments.plot)
    read_steps(arguments.steps)
    read_device(arguments.device)
    # All words first: they are checked in no time, and the model may be slow to make.
    source = read_source(arguments.source, arguments.overrides)
    config = resolve(source.node)
    with contextlib.redirect_stdout(sys.stderr):  # what a user's code prints is no result
        scheduler, notes = _scheduler(arguments, source)
        _check_words(arguments, scheduler is not None)
        model = load_model(arguments.model, arguments.dtype) if arguments.model else None
        told = explained(
            config,
            Given.from_source(source),
            model,
            scheduler,
            steps=arguments.steps,
            device=arguments.device,
            notes=notes,
        )
    if picture and told.schedule is not None:
        _draw(told, picture, arguments.model or "")
    if arguments.json:
        print_json(told.as_dict())
    else:
        print(told)
    return 1 if told.problems else 0


def _check_words(arguments: argparse.Namespace, scheduled: bool) -> None:
    """Refuse words that would do nothing."""
    for word in ("device", "dtype"):
        if getattr(arguments, word) is not None and not arguments.model:
            raise UsageError(f"--{word} is for --model; give both or drop it")
    for word in ("steps", "plot"):
        if getattr(arguments, word) is not None and not scheduled:
            raise UsageError(
                f"--{word} is for a scheduler; name one, such as --scheduler CosineAnnealingLR "
                "--scheduler-arg T_max=1000"
            )


def _draw(told: Any, picture: Path, model: str) -> None:
    from optfactory.explaining.plot import can_be_drawn, plot

    if not any(map(can_be_drawn, told.schedule.rates)):
        is_run = told.schedule.rates or told.schedule.failure
        why = told.problems[-1] if is_run else f"{told.schedule.name} depends on metrics"
        raise UsageError(f"--plot: there is nothing to draw: {why}")
    with written(picture):
        plot(told, picture, model)


def _scheduler(
    arguments: argparse.Namespace, source: Source
) -> tuple[Scheduler | None, Sequence[str]]:
    """The scheduler that the command line names, or else the app's config; what was left out."""
    from optfactory.explaining.schedules import read_scheduler

    stated = _arguments(arguments.scheduler_arg)
    if arguments.scheduler == _NONE:
        return None, ()
    if arguments.scheduler is not None:
        given = {**stated, TARGET: arguments.scheduler}
        return read_scheduler(given, is_trusted=True, place="--scheduler"), ()
    key, node, notes = _node_of_app(source)
    if node is not None:
        return read_scheduler({**node, **stated}, is_trusted=False, place=key), notes
    if stated:
        raise UsageError("--scheduler-arg is for --scheduler NAME; give both or drop it")
    return None, notes


def _node_of_app(source: Source) -> tuple[str, dict[str, Any] | None, list[str]]:
    """The node of a scheduler in an app's config, if there is one with a target; what is none."""
    if source.app is None:
        return "", None, []
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    taken, found, notes = "", None, []
    for key in _KEYS:
        if taken:
            with contextlib.suppress(OmegaConfBaseException):
                if source.app.get(key):
                    notes.append(f"{key}: left out, as the config's '{taken}' is taken")
            continue
        try:
            node = source.app.get(key)
            if not isinstance(node, DictConfig) or TARGET not in node:
                if node:
                    notes.append(f"{key}: left out, as it is no mapping with {TARGET}")
                continue
            values: Any = OmegaConf.to_container(node, resolve=True)
        except OmegaConfBaseException as error:
            raise ConfigError(f"the config at '{key}' cannot be resolved: {error}") from error
        missing = sorted(OmegaConf.missing_keys(node) - {f"{key}.optimizer"})
        if missing:
            raise ConfigError(f"{', '.join(missing)}: a value is missing (???)")
        taken, found = key, {str(name): value for name, value in values.items()}
    return taken, found, notes


def _arguments(words: Sequence[str]) -> dict[str, Any]:
    """The arguments of a scheduler from `k=v`, or a YAML mapping.

    Raises:
        UsageError: they are neither.
    """
    import yaml

    found: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        is_pair = bool(equals) and key.strip().isidentifier()
        try:
            value = _numbers(yaml.safe_load(text if is_pair else word))
        except yaml.YAMLError as error:
            raise UsageError(f"--scheduler-arg {word!r} cannot be read as YAML: {error}") from error
        if is_pair:
            found[key.strip()] = value
        elif isinstance(value, Mapping):
            found |= {str(name): item for name, item in value.items()}
        else:
            raise UsageError(
                f"--scheduler-arg is k=v, such as T_max=1000, or a YAML mapping, got {word!r}"
            )
    fixed = sorted(found.keys() & {"optimizer", *INSTANTIATE_KEYS})
    if fixed:
        raise UsageError(
            f"--scheduler-arg {', '.join(fixed)}: the optimizer is made of the config, and the "
            "scheduler named by --scheduler; drop it"
        )
    return found


def _numbers(value: Any) -> Any:
    """Numbers such as 1e-5, which YAML 1.1 takes for text, as numbers."""
    if isinstance(value, Mapping):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    if isinstance(value, str) and value[:1] in "0123456789.+-":
        with contextlib.suppress(ValueError):
            return float(value)
    return value
