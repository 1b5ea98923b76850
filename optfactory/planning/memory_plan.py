"""`plan`: what an optimizer's config means for a model, without allocating anything."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from optfactory.config.group_rules import WHOLE_FIELDS
from optfactory.config.schema import OptimizerConfig
from optfactory.errors import ConfigError
from optfactory.factory import resolve
from optfactory.group_schema import OPTIMIZER_KEY, base_values
from optfactory.groups.grouping import Given, Grouping, sort
from optfactory.groups.origins import without_wrappers
from optfactory.groups.parameters import Params, parameter_names
from optfactory.planning.copies import copies
from optfactory.planning.figures import Alternative, PlanFigures, PlannedGroup, RankFigures
from optfactory.planning.page.document import render_page
from optfactory.planning.sizes import LaidOut, lay_out, model_shares
from optfactory.planning.spread import (
    Holder,
    MeshSizes,
    PlacementsOf,
    Spread,
    read_mesh,
    read_scheme,
)
from optfactory.planning.text import render
from optfactory.registry import Patterns, get_optimizer_info, list_optimizers
from optfactory.step.report import report
from optfactory.step.slots import Slot

if TYPE_CHECKING:
    from omegaconf import DictConfig

_SIZE = re.compile(r"(?P<number>\d+(\.\d+)?)\s*((?P<prefix>[KMGT])(?P<binary>i?))?B?", re.I)


class MemoryPlan(PlanFigures):
    """The figures of a plan, which str() shows as tables, and `to_html` as a page."""

    def __str__(self) -> str:
        return render(self)

    def to_html(self, model: str = "") -> str:
        """The plan as one page for browsers, which loads nothing else.

        Args:
            model: what the title calls the model.
        """
        return render_page(self, model)


def plan(
    cfg: str | Mapping[str, Any] | DictConfig | OptimizerConfig,
    model: nn.Module | Params,
    /,
    *,
    device: str | torch.device | None = None,
    memory: str | int | None = None,
    mesh: MeshSizes | None = None,
    shard: str | None = None,
    placements: PlacementsOf | None = None,
    names: Patterns = "",
    **overrides: Any,
) -> MemoryPlan:
    """Work out what training a model with an optimizer will need, without allocating anything.

    >>> import torch, optfactory
    >>> with torch.device("meta"):
    ...     model = torch.nn.Linear(4096, 4096)
    >>> planned = optfactory.plan("adamw8bit", model, memory="1GiB")
    >>> planned.state_bytes, planned.verdict()
    (34087056, 'fits')

    On a mesh of ranks, without any process:

    >>> planned = optfactory.plan("adamw8bit", model, mesh=3)
    >>> [planned.on_rank(rank).state_bytes for rank in range(3)]
    [11367996, 11367996, 11351352]

    Args:
        cfg: as for `build_optimizer`, and so are `overrides`.
        model: a Module, which may be on the meta device, or what else `build_optimizer` takes. One
            that is sharded already is planned as it is, for this rank.
        device: where the model will be, e.g. ``cuda``; by default where it is, and the CPU for a
            model on the meta device.
        memory: how much that device has, e.g. ``24GiB``, ``80GB`` or a number of bytes; on a mesh,
            that of each rank.
        mesh: the number of ranks that the model will be sharded over, e.g. 8, or that of each of
            two dimensions, e.g. ``2x4``.
        shard: ``fsdp`` cuts every tensor along its first dimension, as `fully_shard`; ``hsdp`` does
            so over the second dimension of the mesh, and the first holds copies; ``tp`` cuts
            matrices along their first dimension over the last of the mesh, keeps all else whole
            there, and does as fsdp over a dimension before. By default fsdp, with two dimensions
            hsdp.
        placements: what is not as `shard` says: placements as a DTensor has them, one for each
            dimension of the mesh, by globs of names, e.g. ``{"*.o_proj.weight": (Shard(0),
            Shard(1))}``, where the last one that matches wins; or a function of a name and a tensor
            that returns them, or None.
        names: globs of other names to plan, such as ``*adamw*``; all by default.

    Raises:
        ConfigError: the config, the parameters, the memory's size or the mesh are refused. Rules
            that match nothing are listed in the plan instead.
    """
    config = resolve(cfg, **overrides)
    size = read_size(memory)
    target = read_device(device)
    compared = _compared(config.name, names)
    sizes = read_mesh(mesh)
    scheme = read_scheme(shard, sizes)
    given = Given.read(model)
    grouping = sort(given, config)
    module = model if isinstance(model, nn.Module) else None
    tensors = _named_tensors(grouping, module)
    holders: Sequence[Holder] = [Holder()]
    if sizes is not None:
        spread = Spread.of(sizes, scheme, tensors, placements)
        holders = spread.holders(tensors.values())
    elif placements is not None:
        raise ConfigError("placements are for a mesh, such as mesh='8' or mesh='2x4'")
    laid_out = lay_out(grouping, config, target, holders)
    figures = [
        _figures(holder, slots, laid_out, module, target)
        for holder, slots in zip(holders, laid_out.ranks, strict=True)
    ]
    order = sorted(range(len(figures)), key=lambda i: -figures[i].nbytes)
    return MemoryPlan(
        config=config,
        groups=_groups(laid_out, config),
        unmatched=grouping.unmatched,
        idle=grouping.idle,
        ranks=tuple(figures[i] for i in order),
        copies=copies(holders[order[0]], tensors.values(), laid_out.ranks[order[0]]),
        alternatives=tuple(
            _alternative(name, config, given, grouping, target, [holders[i] for i in order])
            for name in compared
        ),
        mesh=sizes or (),
        shard=scheme,
        memory=size,
    )


def _compared(name: str, patterns: Patterns) -> list[str]:
    """The names to plan: this one, and those that globs match."""
    given = [patterns] if isinstance(patterns, str) else patterns
    wanted = [str(pattern).strip() for pattern in given]
    idle = [pattern for pattern in wanted if pattern and not list_optimizers(pattern)]
    if idle:
        raise ConfigError(
            f"names are globs such as '*8bit', got {', '.join(map(repr, idle))}, which no "
            "optimizer matches; `optfactory list` prints all names"
        )
    return sorted({name, *list_optimizers(wanted)})


def _named_tensors(grouping: Grouping, module: nn.Module | None) -> dict[str, Tensor]:
    """All parameters, frozen ones of the module included, each once."""
    tensors = {
        name: tensor
        for index, group in enumerate(grouping.groups)
        for name, tensor in zip(parameter_names(group, index), group["params"], strict=True)
    }
    known = set(map(id, tensors.values()))
    for name, tensor in module.named_parameters() if module is not None else ():
        if id(tensor) not in known:
            tensors[without_wrappers(name)] = tensor
    return tensors


def _figures(
    holder: Holder,
    slots: list[Slot],
    laid_out: LaidOut,
    module: nn.Module | None,
    device: torch.device | None,
) -> RankFigures:
    trained = [slot.parameter for slot in slots]
    return RankFigures(
        ranks=holder.ranks,
        report=report(slots),
        shares=(
            *model_shares(module, trained, device, holder),
            *laid_out.optimizer_shares(slots),
        ),
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


def read_device(device: str | torch.device | None) -> torch.device | None:
    """A device from its name.

    Raises:
        ConfigError: there is none of that name.
    """
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
    groups = []
    for index, (group, checked) in enumerate(
        zip(laid_out.grouping.groups, laid_out.configs, strict=True)
    ):
        other = None if checked.name == config.name else checked.name
        _, base = base_values(other, config)
        own = checked.model_dump()
        differing = {key: own[key] for key in base if own[key] != base[key]}
        slots = [slot for slot in laid_out.ranks[0] if slot.group is group]
        groups.append(
            PlannedGroup(
                name=str(group.get("name", index)),
                parameters=tuple(slot.name for slot in slots),
                elements=sum(slot.parameter.numel() for slot in slots),
                overrides={**({OPTIMIZER_KEY: other} if other else {}), **differing},
                reasons=tuple(
                    laid_out.grouping.reasons.get(id(slot.parameter), "") for slot in slots
                ),
            )
        )
    return tuple(groups)


_NONE = object()


def _alternative(
    name: str,
    config: OptimizerConfig,
    given: Given,
    grouping: Grouping,
    device: torch.device | None,
    holders: Sequence[Holder],
) -> Alternative:
    stated = config.model_dump(exclude_unset=True, exclude={"optim_bits", "is_paged", "page_dir"})
    # What two families share by name alone, as a momentum or betas, need not mean the same.
    schema = get_optimizer_info(name).config_class
    shared = next(base for base in type(config).__mro__ if issubclass(schema, base))
    known = {*getattr(shared, "model_fields", ()), *WHOLE_FIELDS} & schema.model_fields.keys()
    # Where all keys are stated, as Hydra does, a name's defaults are no wish for another name.
    own = get_optimizer_info(config.name).defaults
    values = {
        key: value for key, value in stated.items() if key in known and value != own.get(key, _NONE)
    }
    try:
        other = config if name == config.name else resolve({**values, "name": name})
        if other.of_matrices or config.of_matrices:  # what is for vectors is for their own groups
            grouping = sort(given, other)
        laid_out = lay_out(grouping, other, device, holders)
    except ConfigError as error:
        problem = error.problems[0] if error.problems else str(error)
        return Alternative(name, (), problem)
    return Alternative(name, tuple(map(laid_out.optimizer_shares, laid_out.ranks)))
