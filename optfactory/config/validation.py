"""The gate: values become a config, or one error that lists every problem.

Pydantic is the only judge: a configuration that `validate` returns is known to be runnable. The
module loads neither torch nor CuPy, so a config can be checked on any machine in milliseconds.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from optfactory.config.group_rules import RULES_FIELD
from optfactory.config.names import width_of
from optfactory.config.schema import OptimizerConfig
from optfactory.config.widths import CODE_FIELDS, MAP_FIELDS
from optfactory.errors import ConfigError

# torch's and other libraries' switches that configs carry along, each with what to do about it.
FOREIGN_KEYS = {
    "fused": "every optfactory step is fused; drop the key",
    "foreach": "every optfactory step is multi-tensor; drop the key",
    "differentiable": "steps are not differentiable; drop the key",
    "momentum": "this family has none; its first moment's decay is betas[0]",
    "dampening": "this family has none; drop the key",
    "nesterov": "this family has none; drop the key",
    "max_grad_norm": "clip with torch.nn.utils.clip_grad_norm_ before step()",
    "clip_grad_norm": "clip with torch.nn.utils.clip_grad_norm_ before step()",
    "param_groups": "rules belong to the optimizer's config, not to a rule or a group",
    "args": "write its entries as keys of the config",
    "optim_args": "write its entries as keys of the config",
}

# What others call our keys, where the spelling alone leads to a wrong one or to none.
SYNONYMS = {
    "learning_rate": "lr",
    "adam_beta1": "betas",
    "adam_beta2": "betas",
    "adam_epsilon": "eps",
    "wd": "weight_decay",
    "decay": "weight_decay",
    "bits": "optim_bits",
    "paged": "is_paged",
}

Config = TypeVar("Config", bound=OptimizerConfig)


def validate(model: type[Config], values: Mapping[str, object], path: str, title: str) -> Config:
    """Build `model` from `values` or raise one ConfigError that lists every problem.

    Args:
        path: where the values stand in the user's config, e.g. ``optimizer``.
        title: what they configure, e.g. ``optimizer 'adam8bit'``.
    """
    config, errors = model_or_errors(model, values)
    if config is None:
        raise config_error(title, [problem_text(model, path, item) for item in errors])
    return config


def config_error(title: str, problems: list[str]) -> ConfigError:
    """One error for all problems of one configuration."""
    lines = "".join(f"\n  {problem}" for problem in problems)
    return ConfigError(f"invalid config for {title}, {len(problems)} problem(s):{lines}", problems)


def overridden(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A config's values with those that a param group states in their place."""
    dropped: list[str] = []  # what the optimizer asks for beside what the group does without
    if overrides.get("is_paged") is False:
        dropped += ["page_dir", "page_memory"]
    if "optim_bits" in overrides:
        dropped += ["state_bits", "state_format"]
        width = width_of(overrides)
        dropped += CODE_FIELDS if width in ("16bit", "32bit") else ()
        dropped += MAP_FIELDS if width in ("4bit", "fp8") else ()
    elif overrides.get("state_format") == "fp8":
        dropped += MAP_FIELDS
    kept = {key: value for key, value in values.items() if key not in dropped}
    return {**kept, **overrides}


def model_or_errors(
    model: type[Config], values: Mapping[str, object]
) -> tuple[Config | None, list[ErrorDetails]]:
    """`model` of `values`, or None and what pydantic finds wrong with them."""
    try:
        return model.model_validate(dict(values)), []
    except ValidationError as error:
        return None, error.errors()


def problem_text(
    model: type[OptimizerConfig], path: str, item: ErrorDetails, more: Iterable[str] = ()
) -> str:
    """What pydantic found wrong, in our words.

    Args:
        path: where the values stand in the user's config.
        more: keys that are known there beside the model's fields.
    """
    where = ".".join([path, *(str(part) for part in item["loc"])]) if path else ""
    where = where or ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        said = f"{where}: {_unknown_key(str(item['loc'][-1]), model, list(more))}"
        in_group = path.startswith(f"{RULES_FIELD}[")
        return f"{said}; or name it in annotations, if another tool reads it" if in_group else said
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error" and "contradicts" in message:
        return f"{where}: {message}"
    return f"{where}: {message} (got {item['input']!r})"


def _unknown_key(key: str, model: type[OptimizerConfig], more: Sequence[str]) -> str:
    """What to say about a key that the schema does not have, nor a rule, which has `more`."""
    if key in FOREIGN_KEYS:
        return f"unknown key; {FOREIGN_KEYS[key]}"
    fields = [*more, *(name for name in model.model_fields if not more or name != "name")]
    known = [SYNONYMS[key]] if SYNONYMS.get(key) in fields else []
    close = known or difflib.get_close_matches(key, fields, n=1, cutoff=0.6)
    hint = f"did you mean '{close[0]}'? " if close else ""
    shown = f"`optfactory show {model.locked.get('name', model.family)}` lists all"
    keys = f"a rule has {', '.join(more)}, and hyperparameters: {shown}" if more else shown
    return f"unknown key; {hint}{keys}"
