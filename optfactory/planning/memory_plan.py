"""`plan`: what an optimizer's config means for a model, without allocating anything."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from optfactory import memory
from optfactory.errors import ConfigError
from optfactory.factory import resolve
from optfactory.group_rules import RULES_FIELD
from optfactory.grouping import Grouping, group_parameters
from optfactory.param_groups import Params
from optfactory.planning.sizes import (
    STATE,
    LaidOut,
    Share,
    lay_out,
    model_shares,
    state_shares,
)
from optfactory.registry import get_optimizer_info, list_optimizers
from optfactory.report import MemoryReport, report
from optfactory.schema import OptimizerConfig

if TYPE_CHECKING:
    from omegaconf import DictConfig

_SIZE = re.compile(r"(?P<number>\d+(\.\d+)?)\s*((?P<prefix>[KMGT])(?P<binary>i?))?B?", re.I)


@dataclass(frozen=True)
class PlannedGroup:
    """One param group.

    Attributes:
        name: the labels of the rules that match, or its number.
        parameters: their names.
        elements: how many elements they have together.
        overrides: hyperparameters that differ from the optimizer's.
    """

    name: str
    parameters: tuple[str, ...]
    elements: int
    overrides: Mapping[str, Any]


@dataclass(frozen=True)
class Alternative:
    """The same training under another name, with the same hyperparameters and rules.

    Attributes:
        name: of the optimizer.
        shares: bytes of its state.
        problem: why the config cannot have this name; else empty.
    """

    name: str
    shares: tuple[Share, ...]
    problem: str = ""

    @property
    def state_bytes(self) -> int:
        """Bytes of all state."""
        return sum(share.nbytes for share in self.shares)


@dataclass(frozen=True)
class MemoryPlan:
    """What training a model with an optimizer will need; str() shows it as tables.

    Attributes:
        config: the optimizer's.
        groups: the param groups, as the optimizer will have them.
        unmatched: rules that match nothing, for which `build_optimizer` refuses, and the message.
        idle: other rules that change nothing here, and why.
        report: bits, bytes and place of every parameter's state, as `memory_report()` gives it.
        shares: bytes of parameters, buffers, gradients and state. Activations come on top.
        alternatives: what every name would take.
        memory: bytes that there are on the device, if the caller said so.
    """

    config: OptimizerConfig
    groups: tuple[PlannedGroup, ...]
    unmatched: Mapping[str, str]
    idle: Mapping[str, str]
    report: MemoryReport
    shares: tuple[Share, ...]
    alternatives: tuple[Alternative, ...]
    memory: int | None = None

    @property
    def state_bytes(self) -> int:
        """Bytes of all state."""
        return sum(share.nbytes for share in self.shares if share.what == STATE)

    def needed(self, shares: tuple[Share, ...] | None = None) -> tuple[int, int]:
        """Bytes on the parameters' device: those that must stay, and those that can leave.

        Args:
            shares: of another name's state, in place of this one's.
        """
        device = self.shares[0].device if self.shares else "cpu"
        state = self.shares if shares is None else shares
        all_shares = [s for s in self.shares if s.what != STATE]
        all_shares += [s for s in state if s.what == STATE]
        here = [s for s in all_shares if s.device == device]
        stay = sum(s.nbytes for s in here if s.place == memory.RESIDENT)
        return stay, sum(s.nbytes for s in here) - stay

    def verdict(self, shares: tuple[Share, ...] | None = None) -> str:
        """Whether it fits: ``fits``, ``fits paged`` (some state will be elsewhere) or ``no``."""
        if self.memory is None:
            return ""
        stay, leave = self.needed(shares)
        if stay + leave <= self.memory:
            return "fits"
        return "fits paged" if stay <= self.memory else "no"

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON has it."""
        stay, leave = self.needed()
        return {
            "config": self.config.model_dump(mode="json"),
            "groups": [asdict(group) for group in self.groups],
            "unmatched": dict(self.unmatched),
            "idle": dict(self.idle),
            "shares": [asdict(share) for share in self.shares],
            "state_bytes": self.state_bytes,
            "bytes_that_stay": stay,
            "bytes_that_can_leave": leave,
            "parameters": [asdict(row) for row in self.report.rows],
            "alternatives": [
                {
                    "name": other.name,
                    "state_bytes": None if other.problem else other.state_bytes,
                    "verdict": "" if other.problem else self.verdict(other.shares),
                    "problem": other.problem,
                }
                for other in self.alternatives
            ],
            "memory": self.memory,
            "verdict": self.verdict(),
        }

    def __str__(self) -> str:
        from optfactory.planning.text import render

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
    (34087048, 'fits')

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
