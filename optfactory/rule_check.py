"""A config with its rules: each rule is checked by the family of the optimizer that it is for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from optfactory.config.group_rules import (
    OTHERS_FIELD,
    RULES_FIELD,
    WHOLE_FIELDS,
    GroupRule,
    read_rules,
    rules_of,
)
from optfactory.config.schema import OptimizerConfig, family_class
from optfactory.config.validation import config_error, model_or_errors, overridden, problem_text
from optfactory.errors import UnknownOptimizerError
from optfactory.group_schema import OPTIMIZER_KEY, others_name, values_of_other
from optfactory.registry import get_optimizer_info, implied_fields

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
    check = _Check(model, values, path)
    rules = check.rules(values.get(RULES_FIELD))
    others = check.others(values.get(OTHERS_FIELD)) if model.of_matrices else {}
    problems += check.problems
    if config is None or problems:
        raise config_error(title, problems)
    update: dict[str, Any] = {}
    if rules:
        update[RULES_FIELD] = {k: _plain(rule, rules[k]) for k, rule in rules_of(config).items()}
    if others:
        update[OTHERS_FIELD] = others
    return config.model_copy(update=update) if update else config


class _Check:
    """Checks what a config says of some parameters, beside what it says of all.

    Attributes:
        problems: what was found so far. What is wrong with the config alone is not repeated.
    """

    def __init__(self, model: type[OptimizerConfig], values: Mapping[str, Any], path: str) -> None:
        self.problems: list[str] = []
        self._path = path
        self._family = family_class(model)
        own = {key: value for key, value in values.items() if key not in WHOLE_FIELDS}
        self._own = {**model.locked, **own}
        _, errors = model_or_errors(self._family, self._own)
        self._known = {(item["loc"], item["msg"]) for item in errors}

    def rules(self, given: object) -> dict[str, OptimizerConfig]:
        """The hyperparameters that each rule leads to. Matchers are fields, and checked there."""
        try:
            rules = read_rules(given)
        except ValueError:  # the model says so
            return {}
        checked = {}
        for label, rule in rules.items() if isinstance(rules, Mapping) else ():
            stated = rule.model_dump() if isinstance(rule, GroupRule) else rule
            if not isinstance(stated, Mapping):
                continue
            place = self._place(RULES_FIELD, str(label))
            overrides = {k: stated[k] for k in stated if k not in GroupRule.model_fields}
            if "name" in overrides:
                self.problems.append(
                    f"{place}.name: is the optimizer's own; another one for what the rule matches "
                    f"is {OPTIMIZER_KEY}: {overrides.pop('name')}"
                )
            more = tuple(GroupRule.model_fields)
            config = self._check(stated.get(OPTIMIZER_KEY), overrides, place, OPTIMIZER_KEY, more)
            if config is not None:
                checked[str(label)] = config
        return checked

    def others(self, given: object) -> dict[str, Any]:
        """What `others` says, as plain values."""
        if not isinstance(given, Mapping):
            return {}  # the model says so, if it is not null
        overrides = {key: value for key, value in given.items() if key != "name"}
        name = given.get("name", others_name(self._own))
        place = self._place(OTHERS_FIELD)
        config = self._check(name, overrides, place, "name", ())
        if config is None:
            return {}
        if config.of_matrices:
            self.problems.append(
                f"{place}.name: '{config.name}' trains matrices alone; name one "
                "for vectors and embeddings, such as adamw8bit"
            )
        values = config.model_dump()
        named = {"name": config.name} if "name" in given else {}
        keys = {**implied_fields(str(name), config.name), **overrides}
        return {**named, **{key: values[key] for key in keys}}

    def _place(self, *keys: str) -> str:
        return ".".join(filter(None, (self._path, *keys)))

    def _check(
        self, name: object, overrides: Mapping[str, Any], place: str, key: str, more: Iterable[str]
    ) -> OptimizerConfig | None:
        """The config of some parameters; None if it is refused, with the problems noted.

        Args:
            name: of the optimizer that is stated there, under `key`.
            more: keys that are known there beside hyperparameters.
        """
        try:
            judge, base = _judge(name, self._family, self._own)
        except UnknownOptimizerError as error:
            self.problems.append(f"{place}.{key}: {error}")
            return None
        values = overridden(base, {**overrides, "name": base.get("name")})
        config, errors = model_or_errors(judge, values)
        self.problems += [
            problem_text(judge, place, item, more)
            for item in errors
            if item["loc"][0] in overrides or (item["loc"], item["msg"]) not in self._known
        ]
        return config


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
    return get_optimizer_info(name).config_class, values_of_other(name, own)


def _plain(rule: GroupRule, checked: OptimizerConfig) -> GroupRule:
    """A rule with what it states in the form of the schema's fields."""
    values = checked.model_dump()
    stated = {key: values[key] for key in rule.overrides}
    if rule.optimizer is not None:
        implied = implied_fields(rule.optimizer, checked.name)
        stated |= {key: values[key] for key in implied} | {OPTIMIZER_KEY: checked.name}
    return GroupRule.model_validate({**rule.model_dump(exclude=set(stated)), **stated})
