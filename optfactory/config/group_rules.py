"""Rules for param groups, as a config states them: which parameters, and what differs for them.

A rule is a mapping of matchers, which a parameter must meet all, and of hyperparameters:

>>> rule = GroupRule(modules="Embedding", optim_bits=32)
>>> rule.modules, rule.overrides
(('Embedding',), {'optim_bits': 32})
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    field_validator,
    model_serializer,
    model_validator,
)

from optfactory.config.fields import read_number
from optfactory.config.ready_rules import ready_rules
from optfactory.errors import ConfigError

_COMPARISONS = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
}
_COMPARISON = re.compile(r"(<=|>=|==|<|>)?\s*([0-9]+)")


def _read_texts(value: object) -> object:
    """Accept one text where a list of alternatives may stand, and null for none."""
    return () if value is None else (value,) if isinstance(value, str) else value


def _read_comparison(value: object) -> object:
    """Accept a plain number of dimensions, which means exactly that many."""
    value = read_number(value)
    found = _COMPARISON.fullmatch(str(value).strip())
    if found is None:
        raise ValueError('Input should be a number of dimensions or a comparison such as "<=1"')
    return f"{found[1] or '=='}{found[2]}"


_TEXTS = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
Texts = Annotated[tuple[str, ...], BeforeValidator(_read_texts), WithJsonSchema(_TEXTS)]
_NDIM = {
    "anyOf": [
        {"type": "integer", "minimum": 0},
        {"type": "string", "pattern": f"^\\s*{_COMPARISON.pattern}\\s*$"},
    ]
}
Comparison = Annotated[str, BeforeValidator(_read_comparison), WithJsonSchema(_NDIM)]
Scale = Annotated[float, BeforeValidator(read_number), Field(gt=0, allow_inf_nan=False)]
Decay = Annotated[float, BeforeValidator(read_number), Field(gt=0, le=1)]


class GroupRule(BaseModel):
    """One rule: parameters that meet all its matchers get what its other keys say.

    A matcher that lists several values is met by any of them. Keys that are no fields of this
    class override hyperparameters of the optimizer, `optim_bits` and `is_paged` included; or they
    are those of the rule's own optimizer, if it names one.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    match: Texts = Field(default=(), description='globs on the full name, e.g. "head.*"')
    regex: Texts = Field(default=(), description="regular expressions, found anywhere in the name")
    modules: Texts = Field(
        default=(), description="globs on the class of the owning module, base classes included"
    )
    ndim: Comparison | None = Field(
        default=None, description='number of dimensions: 1, "<=1", ">=2"'
    )
    listed_by: str | None = Field(
        default=None,
        description="a method of the model that returns names: no_weight_decay (timm)",
    )
    hidden: bool | None = Field(
        default=None,
        description="whether it is a matrix inside the model: no vector, embedding or output head",
    )
    optional: bool = Field(default=False, description="whether it may match nothing")
    optimizer: str | None = Field(
        default=None, description="another optimizer, e.g. lion8bit, with defaults of its own"
    )
    lr_scale: Scale | None = Field(default=None, description="multiplies the learning rate")
    layer_decay: Decay | None = Field(
        default=None, description="multiplies the learning rate once per layer below the last"
    )
    blocks: str | None = Field(
        default=None,
        description="for layer_decay: glob on the name of the list of blocks; null: the largest",
    )

    @field_validator("regex")
    @classmethod
    def _must_compile(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            try:
                re.compile(text)
            except re.error as error:
                raise ValueError(f"{text!r} is no regular expression: {error}") from error
        return value

    @field_validator("listed_by")
    @classmethod
    def _must_be_a_name(cls, value: str | None) -> str | None:
        if value is not None and not value.isidentifier():
            raise ValueError("Input should be the name of a method")
        return value

    @model_validator(mode="after")
    def _is_a_rule(self) -> GroupRule:
        if not self.matchers and self.layer_decay is None:
            raise ValueError(
                "has no matcher; give at least one of match, regex, modules, ndim, listed_by, "
                "hidden"
            )
        if self.lr_scale is not None and "lr" in self.overrides:
            raise ValueError("has both lr and lr_scale; keep one of them")
        if self.blocks is not None and self.layer_decay is None:
            raise ValueError("blocks is for layer_decay; give both or drop it")
        changes = (self.optimizer, self.lr_scale, self.layer_decay)
        if not self.overrides and changes == (None, None, None):
            raise ValueError(
                "changes nothing; add a hyperparameter, lr_scale, layer_decay or optimizer"
            )
        return self

    @model_serializer
    def _as_it_was_given(self) -> dict[str, Any]:
        given = {key: getattr(self, key) for key in type(self).model_fields if self._says(key)}
        texts = {key: _plain(value) for key, value in given.items()}
        return {**texts, **self.overrides}

    def _says(self, key: str) -> bool:
        return bool(getattr(self, key) != type(self).model_fields[key].default)

    @property
    def overrides(self) -> dict[str, Any]:
        """The hyperparameters that differ for what the rule matches, as they were given."""
        return dict(self.model_extra or {})

    @property
    def matchers(self) -> list[str]:
        """The keys of its matchers."""
        keys = ("match", "regex", "modules", "ndim", "listed_by", "hidden")
        return [key for key in keys if self._says(key)]

    def fits_ndim(self, ndim: int) -> bool:
        """Whether a number of dimensions meets `ndim`; always without it."""
        if self.ndim is None:
            return True
        sign = self.ndim.rstrip("0123456789")
        return bool(_COMPARISONS[sign](ndim, int(self.ndim.removeprefix(sign))))


def _plain(value: object) -> object:
    """A tuple as YAML has it: one text alone, or a list."""
    if not isinstance(value, tuple):
        return value
    return value[0] if len(value) == 1 else list(value)


def read_rules(value: object) -> object:
    """Accept null for no rules, and the names of ready rules; drop rules that are null."""
    if isinstance(value, str):
        value = (value,)
    if isinstance(value, (list, tuple)) and value and all(isinstance(x, str) for x in value):
        try:
            return ready_rules(*value)
        except ConfigError as error:
            raise ValueError(str(error)) from None
    if isinstance(value, Mapping):
        return {label: rule for label, rule in value.items() if rule is not None}
    return {} if value is None else value


GroupRules = Annotated[dict[str, GroupRule], BeforeValidator(read_rules)]

# The field of configs that holds them. Families do not have it, only the configs of names: a
# param group has no rules of its own.
RULES_FIELD = "param_groups"


# The field of configs whose optimizer is for matrices: what all else is trained with.
OTHERS_FIELD = "others"

# Fields of configs, and not of param groups.
WHOLE_FIELDS = (RULES_FIELD, OTHERS_FIELD)

Others = Annotated[dict[str, Any], BeforeValidator(lambda value: {} if value is None else value)]


def rules_of(config: BaseModel) -> dict[str, GroupRule]:
    """The rules of a config; none if it is that of a family or of one group."""
    return dict(getattr(config, RULES_FIELD, {}))
