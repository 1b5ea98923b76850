"""Types of configuration fields: numbers as Python, YAML files and command lines write them."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, get_args

import yaml
from pydantic import AfterValidator, BeforeValidator, Field


def read_number(value: object) -> object:
    """Read 0-d arrays and tensors as numbers, and refuse booleans, which float() would take."""
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        if getattr(value, "is_meta", False):
            raise ValueError("Input should be a number, not a tensor without data (device 'meta')")
        value = value.item()
    if isinstance(value, bool):
        raise ValueError("Input should be a number, not a boolean")
    return value


def read_choice(value: object) -> object:
    """As `read_number`, for choices among integers: these do not read text by themselves."""
    value = read_number(value)
    return int(value) if isinstance(value, str) and value.strip().isdecimal() else value


def read_pair(value: object) -> object:
    """Accept "(0.9, 0.999)", the form in which command lines and some YAML files carry betas."""
    value = _literal(value)
    if not isinstance(value, Sequence) or len(value) != 2:
        raise ValueError("Input should be two numbers such as [0.9, 0.999]")
    return tuple(value)


def read_three(value: object) -> object:
    """As `read_pair`, for three numbers."""
    value = _literal(value)
    if not isinstance(value, Sequence) or len(value) != 3:
        raise ValueError("Input should be three numbers such as [0.9, 0.999, 0.9999]")
    return tuple(value)


def _literal(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return None


def _ascending(pair: tuple[float, float]) -> tuple[float, float]:
    if not pair[0] <= pair[1]:
        raise ValueError("Input should be a lower bound and a greater or equal upper bound")
    return pair


Number = Annotated[float, BeforeValidator(read_number), Field(ge=0, allow_inf_nan=False)]
Beta = Annotated[float, BeforeValidator(read_number), Field(ge=0, lt=1, allow_inf_nan=False)]
Betas = Annotated[tuple[Beta, Beta], BeforeValidator(read_pair)]
ThreeBetas = Annotated[tuple[Beta, Beta, Beta], BeforeValidator(read_three)]
Count = Annotated[int, BeforeValidator(read_number)]
Bound = Annotated[float, BeforeValidator(read_number), Field(ge=0)]
Bounds = Annotated[tuple[Bound, Bound], BeforeValidator(read_pair), AfterValidator(_ascending)]

# Kernels are compiled for one block size; powers of two keep a block's work vectorizable.
_BlockSize = Literal[64, 128, 256, 512, 1024, 2048, 4096]
BLOCK_SIZES: tuple[int, ...] = get_args(_BlockSize)
BlockSize = Annotated[_BlockSize, BeforeValidator(read_choice)]
Bits = Annotated[Literal[4, 8, 16, 32], BeforeValidator(read_choice)]


def read_widths(value: object) -> object:
    """Accept "{exp_avg: 8}" with or without quotes, as command lines and YAML files carry it."""
    if isinstance(value, Mapping):
        return dict(value)
    try:
        return yaml.safe_load(value) if isinstance(value, str) else value
    except yaml.YAMLError:
        return value


# Bits of each state, by its name.
StateBits = Annotated[dict[str, Bits], BeforeValidator(read_widths)]
