"""The param groups that the optimizer will have: what made them, and what each of them stores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from optfactory.config.group_rules import WHOLE_FIELDS
from optfactory.config.schema import OptimizerConfig
from optfactory.explaining.figures import OWN, Group, Rate, Setting, States
from optfactory.group_schema import OPTIMIZER_KEY, base_values
from optfactory.groups.grouping import Grouping
from optfactory.groups.merging import Hit, Making
from optfactory.planning.sizes import lay_out
from optfactory.planning.text import kind_of_reason
from optfactory.step.slots import Slot


def groups_of(
    grouping: Grouping, config: OptimizerConfig, device: torch.device | None
) -> tuple[Group, ...]:
    """The param groups of an optimizer that would be built from this.

    Raises:
        ConfigError: rules or groups are refused; rules that match nothing are not.
    """
    laid_out = lay_out(grouping, config, device)
    slots: dict[int, list[Slot]] = {}
    for slot in laid_out.ranks[0]:
        slots.setdefault(id(slot.group), []).append(slot)
    parts = zip(grouping.groups, grouping.makings, laid_out.configs, strict=True)
    return tuple(
        _group(
            str(group.get("name", index)),
            making,
            checked,
            config,
            slots.get(id(group), []),
            grouping.reasons,
        )
        for index, (group, making, checked) in enumerate(parts)
    )


def _group(
    name: str,
    making: Making,
    checked: OptimizerConfig,
    config: OptimizerConfig,
    slots: Sequence[Slot],
    reasons: Mapping[int, str],
) -> Group:
    is_other = checked.name != config.name
    _, base = base_values(checked.name if is_other else None, config)
    values = checked.model_dump(exclude={"name", *WHOLE_FIELDS})
    sayers = making.sayers()
    settings = tuple(
        _setting(key, values[key], base[key], making, sayers.get(key, []))
        for key in values
        if key != "lr" and (key in sayers or values[key] != base[key])
    )
    known = {setting.key for setting in settings} | set(OptimizerConfig.model_fields)
    return Group(
        name=name,
        rules=tuple(hit.label for hit in making.hits),
        optimizer=checked.name,
        is_other=is_other,
        reasons=_reasons(slots, reasons) if any(hit.implied for hit in making.hits) else (),
        parameters=tuple(slot.name for slot in slots),
        elements=sum(slot.parameter.numel() for slot in slots),
        rate=_rate(making, values["lr"], sayers),
        settings=(_optimizer(checked, config, sayers), *settings) if is_other else settings,
        defaults={k: v for k, v in values.items() if is_other and k not in known},
        states=_states(slots),
        values={**values, OPTIMIZER_KEY: checked.name},
    )


def _reasons(slots: Sequence[Slot], reasons: Mapping[int, str]) -> tuple[str, ...]:
    found = dict.fromkeys(reasons.get(id(slot.parameter), "") for slot in slots)
    return tuple(filter(None, found))


def _optimizer(
    checked: OptimizerConfig, config: OptimizerConfig, sayers: Mapping[str, list[Hit | None]]
) -> Setting:
    hits = sayers.get(OPTIMIZER_KEY, [])
    earlier = {hit.label: hit.rule.optimizer for hit in hits[:-1] if hit is not None}
    return Setting(OPTIMIZER_KEY, checked.name, _label(hits), config.name, earlier)


def _rate(making: Making, value: float, sayers: Mapping[str, list[Hit | None]]) -> Rate:
    base = float(making.rate)
    return Rate(value, base, _label(sayers.get("lr", [])), making.factors)


def _setting(key: str, value: Any, was: Any, making: Making, hits: Sequence[Hit | None]) -> Setting:
    earlier = {hit.label: hit.said[key] for hit in hits[:-1] if hit is not None}
    return Setting(key, value, _label(hits), was, earlier)


def _label(hits: Sequence[Hit | None]) -> str:
    if not hits:
        return ""
    return OWN if hits[-1] is None else hits[-1].label


def _states(slots: Sequence[Slot]) -> tuple[States, ...]:
    """The tensors of a group by how their state is stored; the largest part first."""
    alike: dict[tuple[Any, ...], list[Slot]] = {}
    for slot in slots:
        layout = slot.layout
        codecs = tuple((state.name, codec.name) for state, codec in layout.stored)
        reason = "; ".join(filter(None, (layout.reason, layout.unpaged)))
        alike.setdefault((codecs, layout.where, kind_of_reason(reason)), []).append(slot)
    found = [
        States(
            codecs=dict(codecs),
            place=where,
            reason=reason,
            tensors=len(members),
            nbytes=sum(slot.layout.nbytes for slot in members),
            names=tuple(slot.name for slot in members),
        )
        for (codecs, where, reason), members in alike.items()
    ]
    return tuple(sorted(found, key=lambda states: -states.nbytes))
