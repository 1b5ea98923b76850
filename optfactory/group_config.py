"""The config of one param group: what the optimizer's config says and the group overrides."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from optfactory import backends
from optfactory.errors import ConfigError
from optfactory.group_rules import RULES_FIELD, rules_of
from optfactory.grouping import Grouping
from optfactory.param_groups import ANNOTATIONS
from optfactory.schema import OptimizerConfig, family_class
from optfactory.validation import config_error, overridden, validate


def group_config(group: Mapping[str, Any], config: OptimizerConfig, place: str) -> OptimizerConfig:
    """The checked config of one group; it may differ from the optimizer's in what a name locks.

    Args:
        config: the optimizer's.
        place: where the group stands, for messages.

    Raises:
        ConfigError: a hyperparameter is refused, or does not fit the group's parameters.
    """
    overrides = {key: value for key, value in group.items() if key not in ANNOTATIONS}
    title = f"optimizer '{config.name}'"
    values = overridden(config.model_dump(exclude={RULES_FIELD}), overrides)
    checked = validate(family_class(type(config)), values, place, title)
    problem = _placement_problem(checked, group["params"])
    problem = problem or _rounding_problem(checked, group["params"])
    if problem:
        raise config_error(title, [f"{place}.{problem}"])
    return checked


def check_groups(grouping: Grouping, config: OptimizerConfig) -> list[OptimizerConfig]:
    """The config of each group; refuses bad rules and all bad groups at once.

    Raises:
        ConfigError: lists every problem.
    """
    problems = [*grouping.problems, *grouping.unmatched.values()]
    configs = []
    for index, group in enumerate(grouping.groups):
        try:
            configs.append(group_config(group, config, group_place(group, index, config)))
        except ConfigError as error:
            problems += [problem for problem in error.problems if problem not in problems]
    if problems:
        raise config_error(f"optimizer '{config.name}'", problems)
    return configs


def group_place(group: Mapping[str, Any], index: int, config: OptimizerConfig) -> str:
    """Where a group stands, for messages: by the rules that made it, or by its number."""
    place = index if not rules_of(config) else group.get("name", index)
    return f"{RULES_FIELD}[{place}]"


def annotations_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """What a group holds beside its hyperparameters."""
    return {key: group[key] for key in ANNOTATIONS if key in group}


def _placement_problem(config: OptimizerConfig, params: list[Tensor]) -> str:
    """Why a group's state cannot live where its config says; empty if it can."""
    kinds = {p.device.type for p in params} - {"meta"}
    other = sorted(kinds - {"cpu", "cuda"})
    if config.is_paged and other:
        return f"is_paged: paged state is available on CPUs and CUDA devices, got one on {other[0]}"
    gpus = [p.device for p in params if p.device.type == "cuda"]
    if config.is_paged and gpus and backends.backend_for(gpus[0]).name == "reference":
        return "is_paged: the portable backend cannot page state of GPU parameters; use the kernels"
    if config.page_memory != "auto" and kinds and "cuda" not in kinds:
        return f"page_memory: is for CUDA parameters, got parameters on {sorted(kinds)}; drop it"
    folder = config.page_dir
    if folder is not None and kinds and "cpu" not in kinds:
        return f"page_dir: is for CPU parameters, got parameters on {sorted(kinds)}; drop it"
    if folder is not None and not (os.path.isdir(folder) and os.access(folder, os.W_OK)):
        return f"page_dir: not a folder that can be written to (got {folder!r})"
    return _capture_problem(config, params)


def _rounding_problem(config: OptimizerConfig, params: list[Tensor]) -> str:
    if config.param_rounding == "nearest" or any(p.dtype.itemsize < 4 for p in params):
        return ""
    return "param_rounding: is for 16-bit parameters, got float32 parameters only; drop it"


def _capture_problem(config: OptimizerConfig, params: list[Tensor]) -> str:
    if not config.capturable:
        return ""
    devices = {p.device for p in params if p.device.type != "meta"}
    unable = [device for device in devices if not backends.backend_for(device).supports_capture]
    if unable:
        return f"capturable: needs parameters on a CUDA device, got one on '{unable[0]}'; drop it"
    return ""
