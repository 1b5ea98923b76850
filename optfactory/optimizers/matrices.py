"""What optimizers share whose directions are made orthogonal as whole matrices: fields, scalars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from optfactory.config.fields import Beta, Count, Number
from optfactory.config.schema import OptimizerConfig
from optfactory.errors import ConfigError
from optfactory.matrix.coefficients import MOST_STEPS, NAMED, Triple, steps_of

# Options that would need to know of single elements what is only known of whole matrices.
_OF_ELEMENTS = {"skip_zeros": False, "nonfinite": "propagate", "cautious": False}


def _read_coefficients(value: object) -> object:
    """A named set, or triples of numbers; one triple may stand alone, for all steps."""
    if isinstance(value, str) and value in NAMED:
        return value
    rows = value if isinstance(value, Sequence) and not isinstance(value, str) else ()
    rows = (rows,) if _is_triple(rows) else rows
    if not rows or not all(_is_triple(row) for row in rows):
        raise ValueError(
            f"Input should be one of {', '.join(NAMED)}, or a list of triples of finite numbers"
        )
    return tuple(tuple(map(float, row)) for row in rows)


def _is_triple(row: object) -> bool:
    if not isinstance(row, Sequence) or isinstance(row, str):
        return False
    return len(row) == 3 and all(_is_number(item) for item in row)


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value)


Coefficients = Annotated[str | tuple[Triple, ...], BeforeValidator(_read_coefficients)]


class MatrixConfig(OptimizerConfig):
    """Hyperparameters of the optimizers whose directions are made orthogonal.

    >>> from optfactory import resolve
    >>> config = resolve("muon8bit", ns_steps=6)
    >>> isinstance(config, MatrixConfig), config.ns_steps, config.ns_coefficients
    (True, 6, 'muon')
    """

    of_matrices: ClassVar[bool] = True

    ns_steps: Annotated[Count, Field(ge=1, le=MOST_STEPS)] = Field(
        default=5, description="steps of the Newton-Schulz iteration"
    )
    ns_coefficients: Coefficients = Field(
        default="muon",
        description="polynomials of the steps: muon (Jordan's, as in torch), you, polar_express, "
        "or triples a, b, c",
    )
    ns_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="what operands of products are rounded to; auto: bfloat16 where products of it "
        "are summed up and stored in float32",
    )
    ns_memory: Annotated[Count, Field(gt=0)] | None = Field(
        default=None,
        description="bytes of scratch memory, shared by all matrices; null: what the largest needs",
    )
    eps: Number = Field(default=1e-7, description="least norm by which a matrix is divided")
    adjust_lr: Literal["match_rms_adamw", "original"] = Field(
        default="match_rms_adamw",
        description="step times 0.2 sqrt(max(rows, cols)), for the learning rate of AdamW; or "
        "original: sqrt(max(1, rows / cols)), torch's default",
    )
    split: Annotated[Count, Field(ge=1)] = Field(
        default=1, description="row blocks that are matrices of their own, as in a fused qkv: 3"
    )
    flatten: bool = Field(
        default=False,
        description="parameters of 3 and more dimensions (convolutions) are one matrix [first, "
        "all others]; false: stacks of matrices [E, M, N] (experts)",
    )

    neuron_norm: bool = Field(
        default=False,
        description="divide rows of the orthogonal direction by the root of their second moment, "
        "then scale it to its length before (NorMuon)",
    )
    neuron_beta: Beta = Field(
        default=0.95,
        description="decay rate of the second moment of neurons; only with neuron_norm",
    )

    @field_validator("neuron_beta")
    @classmethod
    def _beta_needs_neuron_norm(cls, value: float, info: ValidationInfo) -> float:
        default = cls.model_fields["neuron_beta"].default
        if value != default and info.data.get("neuron_norm") is False:
            raise ValueError("neuron_beta needs neuron_norm: true; drop it otherwise")
        return value

    @field_validator("ns_coefficients")
    @classmethod
    def _as_many_as_steps(cls, value: Any, info: ValidationInfo) -> Any:
        steps = info.data.get("ns_steps")
        if steps is not None:
            try:
                steps_of(value, steps)
            except ConfigError as error:  # which says the field, as pydantic does
                raise ValueError(str(error).partition(": ")[2]) from None
        return value

    @field_validator(*_OF_ELEMENTS)
    @classmethod
    def _of_whole_matrices(cls, value: object, info: ValidationInfo) -> object:
        field = info.field_name or ""
        if value not in (_OF_ELEMENTS[field], "skip_step"):
            other = "skip_step or propagate" if field == "nonfinite" else "false"
            raise ValueError(
                f"{cls.family} makes directions of whole matrices, in which no element stands for "
                f"itself; set {field}: {other}"
            )
        return value

    @field_validator("compat")
    @classmethod
    def _has_no_peer(cls, value: str) -> str:
        if value != "none":
            raise ValueError(f"bitsandbytes has no {cls.family}; drop it")
        return value
