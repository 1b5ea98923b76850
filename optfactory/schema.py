"""The schema every optimizer's configuration inherits, and the errors it raises.

Pydantic is the only gate: a configuration that `validate` returns is known to be runnable. The
module loads neither torch nor CuPy, so a config can be checked on any machine in milliseconds.
"""

from __future__ import annotations

import ast
import difflib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import ErrorDetails

from optfactory.errors import ConfigError
from optfactory.rules import UpdateRule

# Kernels are compiled for one block size; powers of two keep a block's work vectorizable.
BlockSize = Literal[64, 128, 256, 512, 1024, 2048, 4096]

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


def _read_number(value: object) -> object:
    """Read 0-d arrays and tensors as numbers, and refuse booleans, which float() would take."""
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        if getattr(value, "is_meta", False):
            raise ValueError("Input should be a number, not a tensor without data (device 'meta')")
        value = value.item()
    if isinstance(value, bool):
        raise ValueError("Input should be a number, not a boolean")
    return value


def _read_choice(value: object) -> object:
    """As `_read_number`, for choices among integers: these do not read text by themselves."""
    value = _read_number(value)
    return int(value) if isinstance(value, str) and value.strip().isdecimal() else value


def _read_pair(value: object) -> object:
    """Accept "(0.9, 0.999)", the form in which command lines and some YAML files carry betas."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            value = None
    if not isinstance(value, Sequence) or len(value) != 2:
        raise ValueError("Input should be two numbers such as [0.9, 0.999]")
    return tuple(value)


def _ascending(pair: tuple[float, float]) -> tuple[float, float]:
    if not pair[0] <= pair[1]:
        raise ValueError("Input should be a lower bound and a greater or equal upper bound")
    return pair


Number = Annotated[float, BeforeValidator(_read_number), Field(ge=0, allow_inf_nan=False)]
Beta = Annotated[float, BeforeValidator(_read_number), Field(ge=0, lt=1, allow_inf_nan=False)]
Betas = Annotated[tuple[Beta, Beta], BeforeValidator(_read_pair)]
Count = Annotated[int, BeforeValidator(_read_number)]
Bound = Annotated[float, BeforeValidator(_read_number), Field(ge=0)]
Bounds = Annotated[tuple[Bound, Bound], BeforeValidator(_read_pair), AfterValidator(_ascending)]


class OptimizerConfig(BaseModel):
    """Hyperparameters shared by every optimizer; one subclass per family, one class per name.

    A family's class sets `family` and adds its fields, its rule and its per-step scalars; see
    `optfactory/optimizers/adam.py`. Classes for single names lock what the name states.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    family: ClassVar[str]
    locked: ClassVar[Mapping[str, object]] = {}

    name: str = Field(description="canonical optimizer name")
    lr: Number = Field(default=1e-3, description="learning rate")
    weight_decay: Number = Field(default=0.0, description="weight decay coefficient")
    maximize: bool = Field(default=False, description="follow the gradient upwards")
    optim_bits: Annotated[Literal[8, 32], BeforeValidator(_read_choice)] = Field(
        default=32, description="bits per element of optimizer state: 8 or 32"
    )
    is_paged: bool = Field(
        default=False, description="keep the state of large tensors in memory that can be evicted"
    )
    page_dir: str | None = Field(
        default=None, description="folder of the paged state's files on CPUs; null chooses one"
    )
    page_memory: Literal["auto", "managed", "pinned"] = Field(
        default="auto",
        description="paged state on GPUs: managed (CUDA moves pages), pinned (host memory, "
        "streamed), auto (managed where it is supported)",
    )
    capturable: bool = Field(
        default=False,
        description="keep step and scalars on the GPU, so that a CUDA graph can capture a step",
    )
    min_8bit_size: Annotated[Count, Field(ge=0)] = Field(
        default=4096, description="tensors with fewer elements keep 32-bit state"
    )
    block_size: Annotated[BlockSize, BeforeValidator(_read_choice)] = Field(
        default=256, description="elements that share one scale of 8-bit state"
    )

    block_wise: bool = Field(
        default=True, description="8-bit state: a scale per block (true) or one per tensor (false)"
    )
    signed_map: Literal["dynamic", "symmetric"] = Field(
        default="dynamic",
        description="8-bit map of signed state: dynamic (as everywhere) or symmetric, with a -1",
    )
    second_moment_floor: bool = Field(
        default=True, description="8-bit state: a second moment above 0 is never stored as 0"
    )
    percentile_clipping: Annotated[Count, Field(ge=0, le=100)] = Field(
        default=100,
        description="scale gradients to this percentile of a tensor's last 100 norms; 100: off",
    )
    skip_zeros: bool = Field(
        default=False, description="elements with gradient 0 keep parameter and state, no decay"
    )
    nonfinite: Literal["propagate", "skip_element", "skip_step"] = Field(
        default="propagate", description="what a NaN or infinite gradient does"
    )
    param_rounding: Literal["nearest", "stochastic", "kahan"] = Field(
        default="nearest",
        description="storing 16-bit parameters: nearest, stochastic, or kahan (compensated)",
    )
    seed: Annotated[Count, Field(ge=0, lt=2**24)] = Field(
        default=0, description="seed of stochastic rounding"
    )
    compat: Literal["none", "bitsandbytes"] = Field(
        default="none",
        description="bitsandbytes: scales, codes, order of decay as its CUDA kernels have them",
    )

    @field_validator("*")
    @classmethod
    def _keep_what_the_name_states(cls, value: object, info: ValidationInfo) -> object:
        stated = cls.locked.get(info.field_name or "", value)
        if value != stated:
            raise ValueError(
                f"{value!r} contradicts the name '{cls.locked['name']}'; drop the key, or use "
                f"optimizer={cls.family} with {info.field_name}: {value!r}"
            )
        return value

    @field_validator("page_dir")
    @classmethod
    def _page_dir_needs_paging(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("is_paged") is False:
            raise ValueError("page_dir needs is_paged: true or a paged_ name; drop it otherwise")
        return value

    @field_validator("capturable")
    @classmethod
    def _graphs_cannot_page(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("is_paged", cls.locked.get("is_paged")):
            raise ValueError(
                "a CUDA graph cannot move paged state; set capturable: false, or take a name "
                "without paged_"
            )
        return value

    @field_validator("page_memory")
    @classmethod
    def _page_memory_needs_paging(cls, value: str, info: ValidationInfo) -> str:
        if value != "auto" and info.data.get("is_paged") is False:
            raise ValueError("page_memory needs is_paged: true or a paged_ name; drop it otherwise")
        return value

    @field_validator("block_wise", "second_moment_floor")
    @classmethod
    def _switches_of_8_bits(cls, value: bool, info: ValidationInfo) -> bool:
        if not value and _stated(cls, info, "optim_bits") == 32:
            raise ValueError(f"{info.field_name}: false is for 8-bit state; drop it at 32 bits")
        return value

    @field_validator("block_wise")
    @classmethod
    def _one_scale_has_no_blocks(cls, value: bool, info: ValidationInfo) -> bool:
        if not value and info.data.get("block_size", 256) != 256:
            raise ValueError("block_wise: false has one scale per tensor; drop block_size")
        return value

    @field_validator("signed_map")
    @classmethod
    def _map_of_8_bits(cls, value: str, info: ValidationInfo) -> str:
        if value != "dynamic" and _stated(cls, info, "optim_bits") == 32:
            raise ValueError("signed_map is for 8-bit state; drop it at 32 bits")
        return value

    @field_validator("seed")
    @classmethod
    def _seed_of_stochastic_rounding(cls, value: int, info: ValidationInfo) -> int:
        if value and info.data.get("param_rounding") != "stochastic":
            raise ValueError("seed is for param_rounding: stochastic; set that, or drop seed")
        return value

    @field_validator("compat")
    @classmethod
    def _compat_alone(cls, value: str, info: ValidationInfo) -> str:
        if value == "none":
            return value
        fixed = {
            "signed_map": "dynamic",
            "second_moment_floor": True,
            "skip_zeros": False,
            "nonfinite": "propagate",
            "param_rounding": "nearest",
        }
        other = [key for key, kept in fixed.items() if info.data.get(key, kept) != kept]
        if other:
            raise ValueError(f"compat: bitsandbytes decides {', '.join(other)} itself; drop them")
        return value

    @classmethod
    @abstractmethod
    def rule(cls, group: Mapping[str, Any]) -> UpdateRule:
        """The update rule that a param group's hyperparameters select."""

    @classmethod
    @abstractmethod
    def scalars(cls, group: Mapping[str, Any], step: Any) -> dict[str, Any]:
        """The rule's scalars at a step, in float64, from a param group's current values.

        Only arithmetic may be done with `lr` and `step`: where a CUDA graph is captured they are
        float64 tensors on the device, and so are the scalars.

        Args:
            group: hyperparameters by field name; `lr` and the others may change between steps.
            step: 1-based number of this update.
        """


def _stated(model: type[OptimizerConfig], info: ValidationInfo, field: str) -> object:
    """A field's value, which a name may have locked."""
    return info.data.get(field, model.locked.get(field))


Config = TypeVar("Config", bound=OptimizerConfig)


def validate(model: type[Config], values: Mapping[str, object], path: str, title: str) -> Config:
    """Build `model` from `values` or raise one ConfigError that lists every problem.

    Args:
        path: where the values stand in the user's config, e.g. ``optimizer``.
        title: what they configure, e.g. ``optimizer 'adam8bit'``.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise config_error(
            title, [_problem(model, path, item) for item in error.errors()]
        ) from None


def config_error(title: str, problems: list[str]) -> ConfigError:
    """One error for all problems of one configuration."""
    lines = "".join(f"\n  {problem}" for problem in problems)
    return ConfigError(f"invalid config for {title}, {len(problems)} problem(s):{lines}", problems)


def _problem(model: type[OptimizerConfig], path: str, item: ErrorDetails) -> str:
    where = ".".join([path, *(str(part) for part in item["loc"])]) if path else ""
    where = where or ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"{where}: {unknown_key(str(item['loc'][-1]), model)}"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error" and "contradicts" in message:
        return f"{where}: {message}"
    return f"{where}: {message} (got {item['input']!r})"


def unknown_key(key: str, model: type[OptimizerConfig]) -> str:
    """What to say about a key that the schema does not have."""
    if key in FOREIGN_KEYS:
        return f"unknown key; {FOREIGN_KEYS[key]}"
    known = [SYNONYMS[key]] if SYNONYMS.get(key) in model.model_fields else []
    close = known or difflib.get_close_matches(key, model.model_fields, n=1, cutoff=0.6)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"unknown key; {hint}allowed: {', '.join(model.model_fields)}"
