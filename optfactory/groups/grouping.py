"""From rules to param groups: each parameter gets what all rules that match it say, in order.

A parameter's hyperparameters are the config's, then those of each matching rule, where the later
one wins key by key, then those that its own param group states: see `optfactory.groups.merging`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from optfactory.config.group_rules import OTHERS_FIELD, RULES_FIELD, GroupRule, rules_of
from optfactory.config.schema import OptimizerConfig
from optfactory.errors import UnknownOptimizerError
from optfactory.group_schema import OPTIMIZER_KEY, contradictions, others_rule, schema_of
from optfactory.groups.matching import Matcher
from optfactory.groups.merging import Hit, Making, conflict, without_others
from optfactory.groups.origins import Origins
from optfactory.groups.parameters import Params, is_flat_piece, read_params

_SHOWN_NAMES = 5

_IN_PIECES = (
    "needs whole matrices, not the flat pieces that FullyShardedDataParallel (FSDP1) makes, of "
    "which none can be told from a vector; use 32-bit Adam or AdamW, shard with fully_shard "
    "(FSDP2), or train without sharding"
)

_NAMELESS = (
    "the parameters have no names, so that embeddings and the output head cannot be told from "
    "hidden matrices, and all of two dimensions are trained as such; pass the model or "
    "model.named_parameters(), or put the others into a group with another optimizer, such as "
    '{"params": ..., "optimizer": "adamw8bit"}'
)


_NO_MATRICES = (
    "no parameter is a hidden matrix, so that '{}' trains none, and all are left to its `others`; "
    "`optfactory plan` says of each one why, and a rule with `optimizer` gives it some"
)


@dataclass(frozen=True)
class Grouping:
    """Parameters in groups, as rules have them.

    Attributes:
        groups: param groups with their overrides; with rules, `name` says which ones matched.
        makings: who said what of each group.
        problems: what is wrong with rules, given these parameters.
        unmatched: what to say of rules that match nothing and are not optional, by label.
        idle: other rules that change nothing here, by label, and why.
        models: the Modules that the parameters were taken from.
        reasons: why parameters are no hidden matrices, by the tensor's id, where that matters.
        warning: what could not be told of parameters; else empty.
    """

    groups: list[dict[str, Any]]
    makings: list[Making]
    problems: list[str] = field(default_factory=list)
    unmatched: dict[str, str] = field(default_factory=dict)
    idle: dict[str, str] = field(default_factory=dict)
    models: tuple[nn.Module, ...] = ()
    reasons: Mapping[int, str] = field(default_factory=dict)
    warning: str = ""


@dataclass(frozen=True)
class Given:
    """Parameters as they were handed over.

    Attributes:
        groups: param groups of the user's, with lists of tensors.
        origins: names and modules of the parameters, as far as they are known.
    """

    groups: list[dict[str, Any]]
    origins: Origins

    @classmethod
    def read(cls, params: Params) -> Given:
        """Read parameters of any accepted form.

        Raises:
            ConfigError: nothing to optimize, or parameters that cannot be.
        """
        origins = Origins()
        return cls(read_params(params, origins), origins)

    @property
    def named(self) -> bool:
        """Whether all parameters have names."""
        return all("param_names" in group for group in self.groups if group["params"])


def group_parameters(params: Params, config: OptimizerConfig, lr: Tensor | None = None) -> Grouping:
    """Read parameters and sort them into groups by the config's rules; see `Given`, `sort`."""
    return sort(Given.read(params), config, lr)


def sort(given: Given, config: OptimizerConfig, lr: Tensor | None = None) -> Grouping:
    """Sort parameters into groups by the config's rules; what is wrong with rules is returned.

    Args:
        lr: the learning rate as a tensor, instead of the config's.
    """
    origins = given.origins
    models = tuple(origins.models)
    problems = _contradictions(given.groups)
    implied, stated = others_rule(config), rules_of(config)
    if implied.keys() & stated.keys():
        problems.append(f"{RULES_FIELD}.{OTHERS_FIELD}: is what `{OTHERS_FIELD}` makes; rename it")
    if implied and any(is_flat_piece(p) for group in given.groups for p in group["params"]):
        problems.append(f"name: '{config.name}' {_IN_PIECES}")
    rules = {**implied, **{key: stated[key] for key in stated if key not in implied}}
    base = config.lr if lr is None else lr
    if not rules:
        live = {} if lr is None else {"lr": lr}
        with_rates = own_rates([{**live, **group} for group in given.groups])
        makings = [Making.of(group, (), base) for group in given.groups]
        return Grouping(with_rates, makings, problems, models=models)
    flattens = bool(getattr(config, "flatten", False))
    matchers = {
        label: Matcher(rule, origins, flattens, implied=label in implied)
        for label, rule in rules.items()
    }
    reasons = matchers[OTHERS_FIELD].reasons if OTHERS_FIELD in implied else {}
    for label, matcher in list(matchers.items()):
        found = matcher.problems(given.named)
        problems += [f"{RULES_FIELD}.{label}.{problem}" for problem in found]
        if found:
            del matchers[label]  # it cannot match anything, and that has been said
    sorted_groups: list[dict[str, Any]] = []
    makings = []
    for group in given.groups:
        for making, part in _split(group, matchers, base, problems):
            makings.append(making)
            sorted_groups.append(part)
    used = {hit.label for making in makings for hit in making.hits}
    unmatched, idle = _without_effect(matchers, used | implied.keys(), origins)
    warning = _NAMELESS if implied and not given.named else ""
    if (
        implied
        and not problems
        and not any(schema_of(g, config).of_matrices for g in sorted_groups)
    ):
        warning = _NO_MATRICES.format(config.name)
    groups = own_rates(sorted_groups)
    return Grouping(groups, makings, problems, unmatched, idle, models, reasons, warning)


def _contradictions(groups: list[dict[str, Any]]) -> list[str]:
    """What groups state against the names of their optimizers."""
    problems = []
    for index, group in enumerate(groups):
        place = f"{RULES_FIELD}[{index}]"
        try:
            problems += contradictions(group, place)
        except UnknownOptimizerError as error:
            problems.append(f"{place}.{OPTIMIZER_KEY}: {error}")
    return problems


def own_rates(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups, where a learning rate that is a tensor is of one group alone.

    Schedules change it in place, each group's by a factor of its own. The first group keeps the
    caller's tensor.
    """
    seen: set[int] = set()
    for group in groups:
        lr = group.get("lr")
        if isinstance(lr, Tensor) and id(lr) in seen:
            group["lr"] = lr = lr.detach().clone()
        if isinstance(lr, Tensor):
            seen.add(id(lr))
    return groups


def _without_effect(
    matchers: Mapping[str, Matcher], used: set[str], origins: Origins
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


def _split(
    group: Mapping[str, Any],
    matchers: Mapping[str, Matcher],
    lr: float | Tensor,
    problems: list[str],
) -> list[tuple[Making, dict[str, Any]]]:
    """One group as several, each of the parameters that the same rules match."""
    own = {key: value for key, value in group.items() if key not in ("params", "param_names")}
    names = group.get("param_names")
    found: dict[tuple[Hit, ...], tuple[Making, dict[str, Any]]] = {}
    for index, tensor in enumerate(group["params"]):
        hits = tuple(
            Hit(label, matcher.rule, layer, last, matcher.implied)
            for label, matcher in matchers.items()
            if matcher.hits(tensor)
            for layer, last in [matcher.layer(tensor)]
        )
        hits = without_others(hits, own)
        if hits not in found:
            problem = conflict(hits, names[index] if names else f"params[{index}]")
            problems += [problem] if problem else []
            making = Making.of(own, hits, lr)
            found[hits] = making, making.new_group()
        part = found[hits][1]
        part["params"].append(tensor)
        if names:
            part.setdefault("param_names", []).append(names[index])
    return list(found.values()) or [(Making.of(own, (), lr), dict(group))]


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
