"""From rules to param groups: each parameter gets what all rules that match it say, in order.

A parameter's hyperparameters are the config's, then those of each matching rule, where the later
one wins key by key, then those that its own param group states. Its learning rate is multiplied by
`lr_scale` and `layer_decay` here, once, so that every scheduler of torch keeps the ratios.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase, translate
from typing import Any

from torch import Tensor

from optfactory.group_rules import RULES_FIELD, GroupRule, rules_of
from optfactory.layers import LayerNumbers
from optfactory.origins import Origin, Origins
from optfactory.param_groups import Params, read_params
from optfactory.schema import OptimizerConfig

# The label of a group that no rule matches.
DEFAULT = "default"

_SHOWN_NAMES = 5


@dataclass(frozen=True)
class Grouping:
    """Parameters in groups, as rules have them.

    Attributes:
        groups: param groups with their overrides; with rules, `name` says which ones matched.
        problems: what is wrong with rules, given these parameters.
        unmatched: what to say of rules that match nothing and are not optional, by label.
        idle: other rules that change nothing here, by label, and why.
    """

    groups: list[dict[str, Any]]
    problems: list[str] = field(default_factory=list)
    unmatched: dict[str, str] = field(default_factory=dict)
    idle: dict[str, str] = field(default_factory=dict)


def group_parameters(params: Params, config: OptimizerConfig) -> Grouping:
    """Read parameters and sort them into groups by the config's rules.

    Raises:
        ConfigError: nothing to optimize, or parameters that cannot be. What is wrong with rules is
            returned instead.
    """
    origins = Origins()
    groups = read_params(params, origins)
    rules = rules_of(config)
    if not rules:
        return Grouping(groups)
    named = all("param_names" in group for group in groups if group["params"])
    matchers = {label: _Matcher(rule, origins) for label, rule in rules.items()}
    problems = [
        f"{RULES_FIELD}.{label}.{problem}"
        for label, matcher in matchers.items()
        for problem in matcher.problems(named)
    ]
    if problems:
        return Grouping(groups, problems)
    sorted_groups: list[dict[str, Any]] = []
    used: set[str] = set()
    for group in groups:
        found, hit = _split(group, matchers, config, problems)
        sorted_groups += found
        used |= hit
    unmatched, idle = _without_effect(matchers, used, origins)
    return Grouping(sorted_groups, problems, unmatched, idle)


def _without_effect(
    matchers: Mapping[str, _Matcher], used: set[str], origins: Origins
) -> tuple[dict[str, str], dict[str, str]]:
    """What to say of rules that match no trained parameter: of those that must, and the others."""
    unmatched, idle = {}, {}
    for label, matcher in matchers.items():
        if label in used:
            continue
        if any(matcher.hits(tensor) for tensor, _ in origins.all()):
            idle[label] = "matches only parameters that are not trained"
        elif matcher.rule.optional:
            idle[label] = "matches no parameter, and is optional"
        else:
            why = _nothing_matched(matcher.rule, origins)
            unmatched[label] = f"{RULES_FIELD}.{label}: {why}"
    return unmatched, idle


@dataclass(frozen=True)
class _Hit:
    """A rule that matches a parameter, which is in a layer of so many if the rule has layers."""

    label: str
    rule: GroupRule = field(compare=False)
    layer: int
    last: int


class _Matcher:
    """One rule, prepared to be asked about many parameters."""

    def __init__(self, rule: GroupRule, origins: Origins) -> None:
        self.rule = rule
        self._origins = origins
        self._name_tests: list[Callable[[str], object]] = []
        if rule.match:
            globs = "|".join(map(translate, rule.match))
            self._name_tests.append(re.compile(globs).match)
        if rule.regex:
            expressions = "|".join(f"(?:{text})" for text in rule.regex)
            self._name_tests.append(re.compile(expressions).search)
        self._listed = _listed_names(origins, rule.listed_by) if rule.listed_by else None
        self.layers = _layers(rule, origins)

    def problems(self, named: bool) -> list[str]:
        """What the rule needs to know, and the parameters do not say."""
        rule = self.rule
        by_name = [key for key in rule.matchers if key in ("match", "regex")]
        by_name += ["layer_decay"] if rule.layer_decay is not None else []
        problems = []
        if not named:
            problems += [
                f"{key}: the parameters have no names; pass the model or model.named_parameters()"
                for key in by_name
            ]
        if not self._origins.models:
            problems += [
                f"{key}: needs the model; pass it in place of its parameters"
                for key in ("modules", "listed_by")
                if key in rule.matchers
            ]
        elif self._listed is None and rule.listed_by and not rule.optional:
            problems.append(f"listed_by: the model has no method {rule.listed_by!r}")
        if named and self.layers and not self.layers.lists:
            wanted = f"named {rule.blocks!r}" if rule.blocks else "in the model"
            problems.append(f"layer_decay: there is no list of blocks {wanted}; set blocks to one")
        return problems

    def hits(self, tensor: Tensor) -> bool:
        """Whether a parameter meets all matchers, by any of its names."""
        origin = self._origins.of(tensor)
        if not self.rule.fits_ndim(tensor.ndim):
            return False
        names = origin.names if origin else []
        if not all(any(map(test, names)) for test in self._name_tests):
            return False
        if self.rule.listed_by and not any(name in (self._listed or ()) for name in names):
            return False
        return not self.rule.modules or _owned_by(origin, self.rule.modules)

    def layer(self, tensor: Tensor) -> tuple[int, int]:
        """The layer of a parameter, by its first name, and the last one; 0 without layers."""
        origin = self._origins.of(tensor)
        if self.layers is None or origin is None:
            return 0, 0
        return self.layers.of(origin.names[0]), self.layers.last


def _listed_names(origins: Origins, method: str) -> set[str] | None:
    """The names that models, or modules inside them, return by a method; None if none has it."""
    found = [
        {f"{prefix}.{name}" if prefix else str(name) for name in listing()}
        for model in origins.models
        for prefix, module in model.named_modules()
        if callable(listing := getattr(module, method, None))
    ]
    return set().union(*found) if found else None


def _layers(rule: GroupRule, origins: Origins) -> LayerNumbers | None:
    if rule.layer_decay is None:
        return None
    sizes = [(origin.names[0], tensor.numel()) for tensor, origin in origins.all()]
    return LayerNumbers(sizes, rule.blocks)


def _owned_by(origin: Origin | None, globs: tuple[str, ...]) -> bool:
    classes = {base.__name__ for owner in (origin.owners if origin else ()) for base in owner.mro()}
    return any(fnmatchcase(name, glob) for name in classes for glob in globs)


def _split(
    group: Mapping[str, Any],
    matchers: Mapping[str, _Matcher],
    config: OptimizerConfig,
    problems: list[str],
) -> tuple[list[dict[str, Any]], set[str]]:
    """One group as several, each of the parameters that the same rules match; and those rules."""
    own = {key: value for key, value in group.items() if key not in ("params", "param_names")}
    names = group.get("param_names")
    found: dict[tuple[_Hit, ...], dict[str, Any]] = {}
    for index, tensor in enumerate(group["params"]):
        hits = tuple(
            _Hit(label, matcher.rule, layer, last)
            for label, matcher in matchers.items()
            if matcher.hits(tensor)
            for layer, last in [matcher.layer(tensor)]
        )
        if hits not in found:
            problem = _conflict(hits, names[index] if names else f"params[{index}]")
            problems += [problem] if problem else []
            found[hits] = _new_group(own, hits, config)
        found[hits]["params"].append(tensor)
        if names:
            found[hits].setdefault("param_names", []).append(names[index])
    return list(found.values()) or [dict(group)], {hit.label for hits in found for hit in hits}


def _conflict(hits: tuple[_Hit, ...], place: str) -> str:
    """Why the rules that match one parameter cannot be merged; empty if they can."""
    scaling = [hit.label for hit in hits if hit.rule.lr_scale is not None]
    stating = [hit.label for hit in hits if "lr" in hit.rule.overrides]
    if not (scaling and stating):
        return ""
    return (
        f"{RULES_FIELD}.{stating[-1]}.lr: meets lr_scale of the rule '{scaling[-1]}' at {place}; "
        "keep one of them"
    )


def _new_group(
    own: Mapping[str, Any], hits: tuple[_Hit, ...], config: OptimizerConfig
) -> dict[str, Any]:
    """A group without parameters yet, with what the rules and then the user's group say."""
    overrides: dict[str, Any] = {}
    scales = [1.0]
    for hit in hits:
        overrides |= hit.rule.overrides
        if hit.rule.lr_scale is not None:
            scales[0] = hit.rule.lr_scale
        if hit.rule.layer_decay is not None:
            scales.append(hit.rule.layer_decay ** (hit.last - hit.layer))
    merged = {**overrides, **own}
    scale = math.prod(scales)
    if scale != 1.0:
        merged["lr"] = _scaled(merged.get("lr", config.lr), scale)
    labels = [hit.label if not hit.last else f"{hit.label}[{hit.layer}]" for hit in hits]
    labels = [str(own["name"]), *labels] if "name" in own else labels or [DEFAULT]
    return {**merged, "name": "+".join(labels), "params": []}


def _scaled(lr: Any, scale: float) -> Any:
    """A learning rate times a factor; what is no number stays for the schema to refuse."""
    if isinstance(lr, Tensor):
        return lr * scale
    try:
        return float(lr) * scale
    except (TypeError, ValueError):
        return lr


def _nothing_matched(rule: GroupRule, origins: Origins) -> str:
    """What to say of a rule that matches nothing: what there is to match."""
    if rule.modules:
        classes = dict.fromkeys(owner.__name__ for _, o in origins.all() for owner in o.owners)
        there = f"modules with parameters are {_some(classes)}"
    else:
        names = dict.fromkeys(name for _, origin in origins.all() for name in origin.names)
        there = f"the parameters are {_some(names)}" if names else "see the tensors' ndim"
    return f"matches no parameter; {there}. Mend it, drop it, or set optional: true"


def _some(texts: Iterable[str]) -> str:
    texts = list(texts)
    more = f", ... ({len(texts)} in all)" if len(texts) > _SHOWN_NAMES else ""
    return ", ".join(texts[:_SHOWN_NAMES]) + more
