"""The config of one param group: what the optimizer's config says and the group overrides."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from optfactory import backends
from optfactory.config.group_rules import RULES_FIELD, rules_of
from optfactory.config.schema import OptimizerConfig
from optfactory.config.validation import config_error, overridden, validate
from optfactory.errors import ConfigError, UnknownOptimizerError
from optfactory.group_schema import OPTIMIZER_KEY, base_values
from optfactory.groups.grouping import Grouping
from optfactory.groups.parameters import ANNOTATIONS, is_flat_piece, is_scattered
from optfactory.matrix.stacks import stack_of
from optfactory.rules.options import draws_random_numbers, has_masters


def group_config(
    group: Mapping[str, Any],
    config: OptimizerConfig,
    place: str,
    planned: torch.device | None = None,
    *,
    rounds: bool = False,
) -> OptimizerConfig:
    """The checked config of one group; it may differ from the optimizer's in what a name locks.

    A group that states an optimizer has that family's config, with that name.

    Args:
        config: the optimizer's.
        place: where the group stands, for messages.
        planned: where its parameters will be, if not where they are; need not exist.
        rounds: whether other groups have 16-bit parameters: what the config says of storing those
            may stand in all groups.

    Raises:
        ConfigError: a hyperparameter is refused, or does not fit the group's parameters.
    """
    carried = annotations_of(group, config)
    overrides = {key: value for key, value in group.items() if key not in carried}
    title = f"optimizer '{config.name}'"
    try:
        schema, values = base_values(overrides.pop(OPTIMIZER_KEY, None), config)
    except UnknownOptimizerError as error:
        raise config_error(title, [f"{place}.{OPTIMIZER_KEY}: {error}"]) from None
    checked = validate(schema, overridden(values, overrides), place, title)
    devices = {p.device for p in group["params"] if not p.is_meta}
    problem = _placement_problem(checked, {planned} if planned else devices)
    problem = problem or _backend_problem(checked, devices if planned is None else set())
    problem = problem or _rounding_problem(checked, group, rounds)
    problem = problem or _halves_problem(checked, group)
    problem = problem or _pieces_problem(checked, group["params"])
    problem = problem or _matrix_problem(checked, group)
    if problem:
        raise config_error(title, [f"{place}.{problem}"])
    return checked


def check_groups(
    grouping: Grouping, config: OptimizerConfig, planned: torch.device | None = None
) -> list[OptimizerConfig]:
    """The config of each group; refuses bad rules and all bad groups at once.

    Args:
        planned: as for `group_config`.

    Raises:
        ConfigError: lists every problem.
    """
    problems = [*grouping.problems, *grouping.unmatched.values()]
    rounds = has_16_bit(grouping.groups)
    configs = []
    for index, group in enumerate(grouping.groups):
        try:
            place = group_place(group, index, config)
            configs.append(group_config(group, config, place, planned, rounds=rounds))
        except ConfigError as error:
            problems += [problem for problem in error.problems if problem not in problems]
    if problems:
        raise config_error(f"optimizer '{config.name}'", problems)
    return configs


def has_16_bit(groups: Iterable[Mapping[str, Any]]) -> bool:
    """Whether storing a parameter of these groups rounds it."""
    return any(_rounded(group["params"]) for group in groups)


def group_place(group: Mapping[str, Any], index: int, config: OptimizerConfig) -> str:
    """Where a group stands, for messages: by the rules that made it, or by its number."""
    place = index if not rules_of(config) else group.get("name", index)
    return f"{RULES_FIELD}[{place}]"


def annotations_of(group: Mapping[str, Any], config: OptimizerConfig) -> dict[str, Any]:
    """What a group holds beside its hyperparameters: torch's keys, and those in `annotations`."""
    named = group.get("annotations", config.annotations)
    keys = (*ANNOTATIONS, *(named if isinstance(named, (list, tuple)) else ()))
    return {key: group[key] for key in keys if key in group}


def _placement_problem(config: OptimizerConfig, devices: set[torch.device]) -> str:
    """Why a group's state cannot live where its config says; empty if it can."""
    kinds = {device.type for device in devices}
    other = sorted(kinds - {"cpu", "cuda"})
    if config.is_paged and other:
        return f"is_paged: paged state is available on CPUs and CUDA devices, got one on {other[0]}"
    if config.page_memory != "auto" and kinds and "cuda" not in kinds:
        return f"page_memory: is for CUDA parameters, got parameters on {sorted(kinds)}; drop it"
    folder = config.page_dir
    if folder is not None and kinds and "cpu" not in kinds:
        return f"page_dir: is for CPU parameters, got parameters on {sorted(kinds)}; drop it"
    if folder is not None and not (os.path.isdir(folder) and os.access(folder, os.W_OK)):
        return f"page_dir: not a folder that can be written to (got {folder!r})"
    return ""


def _backend_problem(config: OptimizerConfig, devices: set[torch.device]) -> str:
    """Why the backends of these devices cannot do what the config says; empty if they can."""
    asked = devices if config.is_paged or config.capturable else set()
    for device in asked:
        backend = backends.backend_for(device)
        if config.capturable and not backend.supports_capture:
            return f"capturable: needs parameters on a CUDA device, got one on '{device}'; drop it"
        if config.is_paged and device.type == "cuda" and backend.name == "reference":
            return "is_paged: the portable backend cannot page state of GPU parameters; use kernels"
    return ""


def _rounded(params: Sequence[Tensor]) -> list[int]:
    """Which parameters are 16-bit; frozen ones may be of any kind."""
    return [n for n, p in enumerate(params) if p.is_floating_point() and p.dtype.itemsize < 4]


def _rounding_problem(config: OptimizerConfig, group: Mapping[str, Any], rounds: bool) -> str:
    params = group["params"]
    rounded = _rounded(params)
    stated = {"param_rounding": config.param_rounding != "nearest"}
    stated["master_weights"] = has_masters(config.model_dump())
    field = next((field for field, is_stated in stated.items() if is_stated), "")
    if field and not (rounded or rounds):
        return f"{field}: is for 16-bit parameters, got float32 parameters only; drop it"
    field, numbered = "state_rounding", list(range(len(params)))
    if config.param_rounding == "stochastic":
        field, numbered = "param_rounding", rounded
    elif not draws_random_numbers(config.model_dump()):
        return ""
    scattered = [n for n in numbered if is_scattered(params[n])]
    if not scattered:
        return ""
    names = group.get("param_names") or [f"params[{n}]" for n in range(len(params))]
    return (
        f"{field}: 'stochastic' numbers the elements of a tensor, which cannot be done for "
        f"{', '.join(names[n] for n in scattered[:5])}: sharded along several dimensions behind "
        f"the first; use 'nearest'{' or kahan' if field == 'param_rounding' else ''}"
    )


def _halves_problem(config: OptimizerConfig, group: Mapping[str, Any]) -> str:
    """Which parameters have no half of a float32 number; empty if all have, or need none."""
    if config.master_weights != "split":
        return ""
    params = group["params"]
    names = group.get("param_names") or [f"params[{n}]" for n in range(len(params))]
    other = [names[n] for n in _rounded(params) if params[n].dtype != torch.bfloat16]
    if not other:
        return ""
    return (
        "master_weights: 'split' is for bfloat16, the upper half of a float32 number, got float16 "
        f"parameters ({', '.join(other[:5])}); use master_weights: fp32"
    )


def _pieces_problem(config: OptimizerConfig, params: list[Tensor]) -> str:
    """Why a group cannot be updated in the pieces of FSDP1; empty if it can, or has none."""
    problem = whole_tensors_problem(config) if any(map(is_flat_piece, params)) else ""
    if not problem:
        return ""
    return (
        f"{problem} the flat pieces that FullyShardedDataParallel (FSDP1) makes; use 32-bit Adam "
        "or AdamW without it, shard with fully_shard (FSDP2), or train without sharding"
    )


def whole_tensors_problem(config: OptimizerConfig) -> str:
    """Why a config needs whole tensors, as the beginning of a sentence; empty if parts will do.

    Of parts that say nothing of the whole, as FSDP1 makes, every rank would take a norm or a
    decision of its own; state that is not float32 element by element fails in FSDP's
    optim_state_dict.
    """
    if config.optim_bits != 32 or config.state_bits:
        bits = min([config.optim_bits, *(config.state_bits or {}).values()])
        return f"optim_bits: {bits}-bit state cannot be gathered from"
    if config.rule(config.model_dump()).trust_ratio is not None:
        return f"name: '{config.family}' needs the norms of whole tensors, not of"
    if config.of_matrices:
        return f"name: '{config.family}' needs whole matrices, not"
    if config.master_weights == "split":
        return "master_weights: the integers of 'split', unlike fp32, cannot be gathered from"
    if config.cautious:
        return "cautious: needs what is known of whole tensors, not of"
    if config.percentile_clipping < 100:
        return "percentile_clipping: needs the norms of whole tensors, not of"
    if config.nonfinite == "skip_step":
        return "nonfinite: 'skip_step' must be decided for whole tensors, not for"
    return ""


def _matrix_problem(config: OptimizerConfig, group: Mapping[str, Any]) -> str:
    """Which parameters of a group are no matrices, where these are needed; empty if all are."""
    if not config.of_matrices:
        return ""
    values, params = config.model_dump(), group["params"]
    names = group.get("param_names") or [f"params[{n}]" for n in range(len(params))]
    wrong = [
        f"{name} {tuple(p.shape)}"
        for name, p in zip(names, params, strict=True)
        if p.requires_grad and p.numel() and stack_of(p.shape, values) is None
    ]
    if not wrong:
        return ""
    return (
        f"params: '{config.name}' trains matrices, and stacks of them, which these are not: "
        f"{', '.join(wrong[:5])}; put them into a group with another optimizer, such as "
        '"optimizer": "adamw8bit", or set flatten, or a split that divides their rows'
    )
