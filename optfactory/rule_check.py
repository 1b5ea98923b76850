"""A config with its rules: each rule is checked by the family of the optimizer that it is for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from optfactory.config.group_rules import RULES_FIELD, GroupRule, read_rules, rules_of
from optfactory.config.schema import OptimizerConfig, family_class
from optfactory.config.validation import config_error, model_or_errors, overridden, problem_text
from optfactory.errors import UnknownOptimizerError
from optfactory.group_schema import OPTIMIZER_KEY, values_of_other
from optfactory.registry import get_optimizer_info

Config = TypeVar("Config", bound=OptimizerConfig)


def validate_with_rules(
    model: type[Config], values: Mapping[str, object], path: str, title: str
) -> Config:
    """Build a name's config from `values`, or raise one ConfigError that lists every problem.

    Args:
        path: where the values stand in the user's config, e.g. ``optimizer``.
        title: what they configure, e.g. ``optimizer 'adam8bit'``.
    """
    config, errors = model_or_errors(model, values)
    problems = [problem_text(model, path, item) for item in errors]
    checked, wrong = _checked_rules(model, values, path)
    problems += wrong
    if config is None or problems:
        raise config_error(title, problems)
    rules = rules_of(config)
    if not rules:
        return config
    plain = {label: _plain(rule, checked[label]) for label, rule in rules.items()}
    return config.model_copy(update={RULES_FIELD: plain})


def _checked_rules(
    model: type[OptimizerConfig], values: Mapping[str, Any], path: str
) -> tuple[dict[str, OptimizerConfig], list[str]]:
    """Each rule's hyperparameters beside what the config says, and what is wrong with them.

    Matchers are fields and have been checked. What is wrong with the config alone is not repeated.
    """
    try:
        rules = read_rules(values.get(RULES_FIELD))
    except ValueError:  # the model says so
        rules = None
    if not isinstance(rules, Mapping):
        return {}, []
    family = family_class(model)
    own = {**model.locked, **{key: values[key] for key in values if key != RULES_FIELD}}
    _, errors = model_or_errors(family, own)
    known = {(item["loc"], item["msg"]) for item in errors}
    checked: dict[str, OptimizerConfig] = {}
    problems: list[str] = []
    for label, rule in rules.items():
        given = rule.model_dump() if isinstance(rule, GroupRule) else rule
        if not isinstance(given, Mapping):
            continue
        place = ".".join(filter(None, (path, RULES_FIELD, str(label))))
        overrides = {key: given[key] for key in given if key not in GroupRule.model_fields}
        try:
            judge, base = _judge(given.get(OPTIMIZER_KEY), family, own)
        except UnknownOptimizerError as error:
            problems.append(f"{place}.{OPTIMIZER_KEY}: {error}")
            continue
        config, errors = model_or_errors(
            judge, overridden(base, {**overrides, "name": base.get("name")})
        )
        if config is not None:
            checked[str(label)] = config
        problems += [
            problem_text(judge, place, item, GroupRule.model_fields)
            for item in errors
            if item["loc"][0] in overrides or (item["loc"], item["msg"]) not in known
        ]
        if "name" in overrides:
            problems.append(
                f"{place}.name: is the optimizer's own; another one for what the rule matches is "
                f"{OPTIMIZER_KEY}: {overrides['name']}"
            )
    return checked, problems


def _judge(
    name: object, family: type[OptimizerConfig], own: Mapping[str, Any]
) -> tuple[type[OptimizerConfig], Mapping[str, Any]]:
    """The schema that checks a rule, and the values beside which it stands.

    A name that the rule states holds in this rule; what the config's name states it may override.

    Raises:
        UnknownOptimizerError: nothing of that name.
    """
    if not isinstance(name, str):
        return family, own
    info = get_optimizer_info(name)
    return info.config_class, values_of_other(info, own)


def _plain(rule: GroupRule, checked: OptimizerConfig) -> GroupRule:
    """A rule with what it states in the form of the schema's fields."""
    values = checked.model_dump()
    stated = {key: values[key] for key in rule.overrides}
    if rule.optimizer is not None:
        stated[OPTIMIZER_KEY] = checked.name
    return GroupRule.model_validate({**rule.model_dump(exclude=set(stated)), **stated})
