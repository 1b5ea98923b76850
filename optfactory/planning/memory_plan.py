"""`plan`: what an optimizer's config means for a model, without allocating anything."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from optfactory.config.group_rules import RULES_FIELD
from optfactory.config.schema import OptimizerConfig
from optfactory.errors import ConfigError
from optfactory.factory import resolve
from optfactory.groups.grouping import Grouping, group_parameters
from optfactory.groups.parameters import Params
from optfactory.planning.figures import Alternative, PlanFigures, PlannedGroup
from optfactory.planning.sizes import LaidOut, lay_out, model_shares, state_shares
from optfactory.planning.text import render
from optfactory.registry import get_optimizer_info, list_optimizers
from optfactory.step.report import report

if TYPE_CHECKING:
    from omegaconf import DictConfig

_SIZE = re.compile(r"(?P<number>\d+(\.\d+)?)\s*((?P<prefix>[KMGT])(?P<binary>i?))?B?", re.I)


class MemoryPlan(PlanFigures):
    """The figures of a plan, which str() shows as tables."""

    def __str__(self) -> str:
        return render(self)


def plan(
    cfg: str | Mapping[str, Any] | DictConfig | OptimizerConfig,
    model: nn.Module | Params,
    /,
    *,
    device: str | torch.device | None = None,
    memory: str | int | None = None,
    **overrides: Any,
) -> MemoryPlan:
    """Work out what training a model with an optimizer will need, without allocating anything.

    >>> import torch, optfactory
    >>> with torch.device("meta"):
    ...     model = torch.nn.Linear(4096, 4096)
    >>> planned = optfactory.plan("adamw8bit", model, memory="1GiB")
    >>> planned.state_bytes, planned.verdict()
    (34087056, 'fits')

    Args:
        cfg, overrides: as for `build_optimizer`.
        model: a Module, which may be on the meta device, or what else `build_optimizer` takes.
        device: where the model will be, e.g. ``cuda``; by default where it is, and the CPU for a
            model on the meta device.
        memory: how much that device has, e.g. ``24GiB``, ``80GB`` or a number of bytes.

    Raises:
        ConfigError: the config, the parameters or the memory's size are refused. Rules that match
            nothing are listed in the plan instead.
    """
    config = resolve(cfg, **overrides)
    size = read_size(memory)
    target = _read_device(device)
    grouping = group_parameters(model, config)
    laid_out = lay_out(grouping, config, target)
    module = model if isinstance(model, nn.Module) else None
    state = tuple(state_shares(laid_out))
    return MemoryPlan(
        config=config,
        groups=_groups(laid_out, config),
        unmatched=grouping.unmatched,
        idle=grouping.idle,
        report=report(laid_out.slots),
        shares=(*model_shares(module, laid_out.slots, target), *state),
        alternatives=tuple(
            Alternative(name, state)
            if name == config.name
            else _alternative(name, config, grouping, target)
            for name in list_optimizers()
        ),
        memory=size,
    )


def read_size(text: str | int | None) -> int | None:
    """A number of bytes from "24GiB", "80GB" or a number.

    Raises:
        ConfigError: it is none of these.
    """
    if text is None:
        return None
    found = _SIZE.fullmatch(str(text).strip())
    if found is None or len(found["number"]) > 20 or float(found["number"]) <= 0:
        raise ConfigError(f"memory is a size such as '24GiB' or '80GB', got {text!r}")
    base = 1024 if found["binary"] else 1000
    power = " KMGT".index((found["prefix"] or " ").upper())
    return max(1, round(float(found["number"]) * int(base**power)))


def _read_device(device: str | torch.device | None) -> torch.device | None:
    if device is None:
        return None
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        why = str(error).partition("\n")[0]
        raise ConfigError(
            f"device is one such as 'cpu' or 'cuda', got {device!r}: {why}"
        ) from error


def _groups(laid_out: LaidOut, config: OptimizerConfig) -> tuple[PlannedGroup, ...]:
    whole = config.model_dump(exclude={"name", RULES_FIELD})
    groups = []
    for index, (group, checked) in enumerate(
        zip(laid_out.grouping.groups, laid_out.configs, strict=True)
    ):
        own = checked.model_dump()
        slots = [slot for slot in laid_out.slots if slot.group is group]
        groups.append(
            PlannedGroup(
                name=str(group.get("name", index)),
                parameters=tuple(slot.name for slot in slots),
                elements=sum(slot.parameter.numel() for slot in slots),
                overrides={key: own[key] for key in whole if own[key] != whole[key]},
            )
        )
    return tuple(groups)


def _alternative(
    name: str, config: OptimizerConfig, grouping: Grouping, device: torch.device | None
) -> Alternative:
    stated = config.model_dump(exclude_unset=True, exclude={"optim_bits", "is_paged", "page_dir"})
    known = get_optimizer_info(name).config_class.model_fields
    values = {key: value for key, value in stated.items() if key in known}
    try:
        other = resolve({**values, "name": name})
        return Alternative(name, tuple(state_shares(lay_out(grouping, other, device))))
    except ConfigError as error:
        problem = error.problems[0] if error.problems else str(error)
        return Alternative(name, (), problem)
