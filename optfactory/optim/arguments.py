"""The fields of the config that the classes of `optfactory.optim` take by keyword alone.

They are written out for those who read signatures: type checkers, editors, and command lines such
as Lightning's.
"""

from __future__ import annotations

from typing import Any, Literal, TypedDict


class Options(TypedDict, total=False):
    """Fields of every family."""

    maximize: bool
    page_dir: str | None
    page_memory: Literal["auto", "managed", "pinned"]
    capturable: bool
    block_size: int
    signed_map: Literal["dynamic", "symmetric"]
    second_moment_floor: bool
    state_rounding: Literal["nearest", "stochastic"]
    skip_zeros: bool
    nonfinite: Literal["propagate", "skip_element", "skip_step"]
    param_rounding: Literal["nearest", "stochastic", "kahan"]
    master_weights: Literal["none", "split", "fp32"] | None
    state_format: Literal["dynamic", "fp8"]
    state_bits: dict[str, int] | None
    seed: int | None
    cautious: bool
    cautious_weight_decay: bool
    annotations: tuple[str, ...]
    compat: Literal["none", "bitsandbytes"]
    param_groups: dict[str, dict[str, Any]]


class AdamOptions(Options, total=False):
    """Fields of adam and adamw."""

    bias_correction: bool
    adam_w_mode: bool


class LambOptions(Options, total=False):
    """Fields of lamb."""

    is_paged: bool
    trust_ratio: Literal["lamb", "clip"]
    trust_ratio_bounds: tuple[float, float] | None
    always_adapt: bool


class LarsOptions(Options, total=False):
    """Fields of lars, and what its classes in bitsandbytes never had as an argument."""

    is_paged: bool
    block_wise: bool
    trust_ratio: Literal["lars", "clip"]
    trust_ratio_bounds: tuple[float, float] | None
    always_adapt: bool
    trust_coefficient: float
    eps: float


class PytorchLarsOptions(LarsOptions, total=False):
    """The same for the class whose arguments are those of torch's optimizers."""

    min_8bit_size: int
    percentile_clipping: int


class PagingOptions(Options, total=False):
    """Fields of every family, for the classes without an argument `is_paged`."""

    is_paged: bool


class AdEMAMixOptions(Options, total=False):
    """Fields of ademamix, whose classes in bitsandbytes never had the arguments of the others."""

    percentile_clipping: int
    block_wise: bool


class PagedAdEMAMixOptions(AdEMAMixOptions, total=False):
    """The same for the paged classes, which have no argument `is_paged`."""

    is_paged: bool
