"""The schema every optimizer's configuration inherits."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from typing_extensions import Self

from optfactory.config.cautious import CAUTIOUS, CAUTIOUS_WEIGHT_DECAY, refuse_idle
from optfactory.config.fields import Bits, BlockSize, Count, Number, StateBits
from optfactory.config.peers import BitsandbytesPeer, TorchaoPeer, TorchPeer
from optfactory.config.plain import plain
from optfactory.config.widths import (
    CODE_FIELDS,
    WIDTH_FIELDS,
    least_bits,
    refuse_coarse,
    refuse_other_bits,
    refuse_without_codes,
    stated_widths,
)
from optfactory.rules.language import UpdateRule
from optfactory.rules.options import NOISE_KEY, SEEDS, draws_random_numbers, has_masters

# Keys of param groups beside hyperparameters and what users may add: torch's, schedulers' and ours.
RESERVED_KEYS = (
    *("params", "param_names", "name", "initial_lr"),
    *("optimizer", "format_version", NOISE_KEY),
)

# Fields for one kind of state: what it is, and whether it can be negative.
_OF_STATES = {"signed_map": ("signed state", True), "second_moment_floor": ("second moment", False)}


# How 8-bit state is rounded, as families with slow averages declare it: the nearest code would not
# move as long as an average's increments are less than half the distance of two codes.
StateRounding = Literal["nearest", "stochastic"]
_STATE_ROUNDING = "8-bit state: the nearest code, or stochastic, so that slow averages move on"
STOCHASTIC_STATE: Any = Field(default="stochastic", description=_STATE_ROUNDING)

# What decides whether a seed means something.
_OF_ROUNDING = ("param_rounding", "state_rounding", *WIDTH_FIELDS)


class OptimizerConfig(BaseModel):
    """Hyperparameters shared by every optimizer; one subclass per family, one class per name.

    A family's class sets `family` and adds its fields, its rule and its per-step scalars; see
    `optfactory/optimizers/adam.py`. Classes for single names lock what the name states.

    >>> from optfactory import resolve
    >>> config = resolve("adam8bit", lr=3e-4)
    >>> isinstance(config, OptimizerConfig), config.model_dump(mode="json")["betas"]
    (True, [0.9, 0.999])
    """

    # Built when one is made first: most programs use one of the names.
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, defer_build=True)

    family: ClassVar[str]
    spellings: ClassVar[tuple[str, ...]] = ()  # what others call the family
    torch_peer: ClassVar[TorchPeer | None] = None  # whose checkpoints are read and written
    bitsandbytes_peer: ClassVar[BitsandbytesPeer | None] = None
    torchao_peer: ClassVar[TorchaoPeer | None] = None
    locked: ClassVar[Mapping[str, object]] = {}
    # Widths that the family does not have, and by how many percent the loss of 32 bits is missed
    # after 2000 steps: more than one.
    too_coarse: ClassVar[Mapping[str, float]] = {}
    # Whether directions are made of whole matrices; other parameters need another optimizer.
    of_matrices: ClassVar[bool] = False

    name: str = Field(description="canonical optimizer name")
    lr: Number = Field(default=1e-3, description="learning rate")
    weight_decay: Number = Field(default=0.0, description="weight decay coefficient")
    maximize: bool = Field(default=False, description="follow the gradient upwards")
    optim_bits: Bits = Field(
        default=32, description="bits per element of optimizer state: 4, 8, 16 or 32"
    )
    state_bits: StateBits | None = Field(
        default=None,
        description="bits of single states by their names, as {exp_avg: 8}; others have optim_bits",
    )
    state_format: Literal["dynamic", "fp8"] = Field(
        default="dynamic",
        description="8-bit state: codes of a dynamic map, or 8-bit floats (faster, coarser)",
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
    block_size: BlockSize = Field(
        default=256, description="elements that share one scale of 8-bit state; of 4-bit, half"
    )

    block_wise: bool = Field(
        default=True,
        description="codes of state: a scale per block (true) or one per tensor (false)",
    )
    signed_map: Literal["dynamic", "symmetric"] = Field(
        default="dynamic",
        description="8-bit map of signed state: dynamic (as everywhere) or symmetric, with a -1",
    )
    second_moment_floor: bool = Field(
        default=True, description="8-bit state: a second moment above 0 is never stored as 0"
    )
    state_rounding: StateRounding = Field(default="nearest", description=_STATE_ROUNDING)
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
    master_weights: Literal["none", "split", "fp32"] | None = Field(
        default=None,
        description="of 16-bit parameters: none, split (the lower half of a float32 master beside "
        "bfloat16), fp32 (all of it); null: none, with a warning",
    )
    seed: Annotated[Count, Field(ge=0, lt=SEEDS)] | None = Field(
        default=None,
        description="seed of stochastic rounding; null: of parameters one drawn from torch's "
        "generator when built, of state 0",
    )
    cautious: bool = CAUTIOUS
    cautious_weight_decay: bool = CAUTIOUS_WEIGHT_DECAY
    annotations: tuple[str, ...] = Field(
        default=(), description="keys of param groups that other tools read; they are carried along"
    )
    compat: Literal["none", "bitsandbytes"] = Field(
        default="none",
        description="bitsandbytes: scales, codes, order of decay as its CUDA kernels have them",
    )

    @field_validator("*", mode="before")
    @classmethod
    def _read_as_plain_python(cls, value: object) -> object:
        return plain(value)

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

    @field_validator("annotations")
    @classmethod
    def _annotations_mean_nothing_here(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        taken = [key for key in value if key in cls.model_fields or key in RESERVED_KEYS]
        if taken:
            raise ValueError(f"{', '.join(taken)} have a meaning here; they need no annotation")
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

    @field_validator("optim_bits", "state_bits", "state_format")
    @classmethod
    def _not_too_coarse(cls, value: object, info: ValidationInfo) -> object:
        found = _widths(cls, {**info.data, str(info.field_name): value})
        refuse_coarse(cls.family, cls.too_coarse, found)
        return value

    @field_validator("state_bits")
    @classmethod
    def _bits_as_the_name_says(
        cls, value: dict[str, int] | None, info: ValidationInfo
    ) -> dict[str, int] | None:
        refuse_other_bits(cls.family, cls.locked, value)
        return value

    @field_validator("state_format")
    @classmethod
    def _formats_of_8_bits(cls, value: str, info: ValidationInfo) -> str:
        if value == "fp8" and "fp8" not in _widths(cls, {**info.data, "state_format": value}):
            raise ValueError("fp8 is a format of 8-bit state; set optim_bits: 8, or drop it")
        return value

    @field_validator(*CODE_FIELDS)
    @classmethod
    def _nothing_to_store_without_codes(cls, value: object, info: ValidationInfo) -> object:
        field = str(info.field_name)
        if value != cls.model_fields[field].default:
            bits = known_value(cls, info, "optim_bits")
            refuse_without_codes(field, _widths(cls, info.data), bits)
        return value

    @field_validator("block_wise")
    @classmethod
    def _one_scale_has_no_blocks(cls, value: bool, info: ValidationInfo) -> bool:
        if not value and info.data.get("block_size", 256) != 256:
            raise ValueError("block_wise: false has one scale per tensor; drop block_size")
        return value

    @field_validator("signed_map", "second_moment_floor")
    @classmethod
    def _of_states_that_are_kept(cls, value: object, info: ValidationInfo) -> object:
        field = info.field_name or ""
        what, signed = _OF_STATES[field]
        if value != cls.model_fields[field].default and signed not in _signs(cls):
            raise ValueError(f"{cls.family} keeps no {what} that this could change; drop it")
        return value

    @field_validator("master_weights")
    @classmethod
    def _masters_round_to_nearest(cls, value: str | None, info: ValidationInfo) -> str | None:
        rounding = known_value(cls, info, "param_rounding")
        if value in ("split", "fp32") and rounding in ("stochastic", "kahan"):
            raise ValueError(
                f"{value!r} keeps all that rounding loses, got param_rounding: {rounding!r} too; "
                "drop one of them, or set param_rounding: nearest or master_weights: none"
            )
        return value

    @field_validator("seed")
    @classmethod
    def _seed_of_stochastic_rounding(cls, value: int | None, info: ValidationInfo) -> int | None:
        asked = {key: known_value(cls, info, key) for key in _OF_ROUNDING} | {"compat": "none"}
        if value and not draws_random_numbers(asked):
            raise ValueError(
                "seed is for param_rounding: stochastic, 16-bit state, or state_rounding: "
                "stochastic with 8-bit state; set one of them, or drop seed"
            )
        return value

    @field_validator("compat")
    @classmethod
    def _compat_alone(cls, value: str, info: ValidationInfo) -> str:
        if value == "none":
            return value
        widths = _widths(cls, info.data)
        if not widths <= {"8bit", "32bit"} or info.data.get("state_bits"):
            raise ValueError(
                f"bitsandbytes has no {', '.join(sorted(widths))} state; set optim_bits: 8 or 32 "
                "for all states, or drop it"
            )
        fixed = {
            "signed_map": "dynamic",
            "second_moment_floor": True,
            "skip_zeros": False,
            "nonfinite": "propagate",
            "param_rounding": "nearest",
            "cautious": False,
            "cautious_weight_decay": False,
        }
        fixed["state_rounding"] = cls.model_fields["state_rounding"].default
        other = [key for key, kept in fixed.items() if info.data.get(key, kept) != kept]
        other += ["master_weights"] * has_masters({"master_weights": None, **info.data})
        if other:
            raise ValueError(f"compat: bitsandbytes decides {', '.join(other)} itself; drop them")
        return value

    @model_validator(mode="after")
    def _as_the_rule_has_it(self) -> Self:
        """What other fields decide, those of families too: the rule, its states and its decay."""
        if not (self.state_bits or self.cautious or self.cautious_weight_decay):
            return self
        group = self.model_dump()
        names = [state.name for state in self.rule(group).states]
        strangers = [key for key in self.state_bits or {} if key not in names]
        if strangers:
            has = f"has the states {', '.join(names)}" if names else "keeps no state"
            raise ValueError(f"state_bits: {', '.join(strangers)}: {self.family} {has}")
        if self.cautious or self.cautious_weight_decay:
            # Of a step behind the first, which may be another.
            decaying = self.scalars({**group, "lr": 0.5, "weight_decay": 0.5}, 2.0)
            refuse_idle(self.family, group, self.rule(group), decaying["decay"])
        return self

    def __hash__(self) -> int:
        # Rules for param groups are a mapping, which has no hash. Equal configs still have one.
        return hash((type(self), *(v for v in self.__dict__.values() if not isinstance(v, dict))))

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


def family_class(model: type[OptimizerConfig]) -> type[OptimizerConfig]:
    """The family's class: of a name's fields, those of one param group, and nothing locked."""
    return next(base for base in model.__mro__ if "family" in vars(base))


def _signs(model: type[OptimizerConfig]) -> set[bool]:
    """Of which kinds a name's states are by default: signed ones, and others."""
    fields = {key: field.get_default() for key, field in model.model_fields.items()}
    return {state.signed for state in model.rule(fields | {"name": model.family}).states}


def known_value(model: type[OptimizerConfig], info: ValidationInfo, field: str) -> object:
    """A field's value, which a name may have locked."""
    return info.data.get(field, model.locked.get(field))


def narrowest(model: type[OptimizerConfig], info: ValidationInfo) -> int:
    """The least bits of a state, as far as they are known; 32 where nothing is."""
    return least_bits(_widths(model, info.data))


def _widths(model: type[OptimizerConfig], data: Mapping[str, Any]) -> set[str]:
    """The widths that states may have, as far as fields are known, or locked by the name."""
    return stated_widths({key: data.get(key, model.locked.get(key)) for key in WIDTH_FIELDS})
