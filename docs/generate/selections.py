"""Which rules the settings of a family select: its default, AMSGrad, Nesterov's momentum, ..."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from optfactory.build.wheel.variants import choices, group_of
from optfactory.config.schema import OptimizerConfig, family_class
from optfactory.registry import get_optimizer_info
from optfactory.rules.language import UpdateRule


@dataclass(frozen=True)
class Selection:
    """A rule, and the fewest settings that select it; none for a family's default.

    Attributes:
        settings: values of fields by their names.
        group: all hyperparameters then.
        rule: the rule.
    """

    settings: Mapping[str, Any]
    group: Mapping[str, Any]
    rule: UpdateRule

    @property
    def title(self) -> str:
        """The settings as YAML has them."""
        return ", ".join(f"`{_yaml(key, value)}`" for key, value in self.settings.items())


@cache
def selections(family: str) -> tuple[Selection, ...]:
    """All rules of a family, those of fewer settings first."""
    config_class = get_optimizer_info(family).config_class
    defaults = config_class(name=family).model_dump()
    default = Selection({}, defaults, config_class.rule(defaults))
    found, latest = {_texts(default.rule): default}, [default]
    switches = _switches(family_class(config_class), defaults)
    while latest:
        candidates = [
            Selection(settings, group, config_class.rule(group))
            for before in latest
            for field, value in switches
            if field not in before.settings
            and (
                group := group_of(
                    config_class, family, settings := {**before.settings, field: value}
                )
            )
        ]
        latest = []
        for candidate in candidates:
            if _texts(candidate.rule) not in found:
                found[_texts(candidate.rule)] = candidate
                latest.append(candidate)
    return tuple(found.values())


def _switches(
    config_class: type[OptimizerConfig], defaults: Mapping[str, Any]
) -> list[tuple[str, Any]]:
    """Values of fields other than the defaults, of fields that have a handful of them."""
    return [
        (field, value)
        for field in config_class.model_fields
        for value in choices(config_class, field)
        if value != defaults[field] and field not in ("optim_bits", "lr", "weight_decay")
    ]


def _texts(rule: UpdateRule) -> tuple[str, str | None, str]:
    return rule.name, rule.trust_ratio, rule.ratio_of


def _yaml(key: str, value: object) -> str:
    if isinstance(value, float) and value > 0:
        return f"{key} > 0"
    return f"{key}: {str(value).lower() if isinstance(value, bool) else value}"
