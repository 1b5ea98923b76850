"""What tests must know of a family beside its step, said beside its reference.

What a family does not say is as of all families: tables in the tests themselves have it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# The longest step that Adam can take, in learning rates.
ADAMS_LONGEST_STEP = (1 - 0.9) / (1 - 0.999) ** 0.5


@dataclass(frozen=True)
class Flip:
    """One change of a field, in a context `base` in which it must show.

    Some show only with parameters of 16 bits, with a gradient that is not finite, or after more
    steps than two.
    """

    value: Any
    base: Mapping[str, Any]
    dtype: str = "float32"
    spoiled: bool = False
    steps: int = 2


def flip(value: Any, **base: Any) -> Flip:
    """A change that shows in all dtypes."""
    return Flip(value, base)


@dataclass(frozen=True)
class Facts:
    """What is true of one family alone.

    Attributes:
        flips: of each field that not all families have, or that has other values here, changes
            that must show.
        refused: of a field, values that are an error in their context.
        variants: options by name with which every step is compared with the reference.
        peak_lr: the learning rate at which long runs start; None: three times the default.
        longest_step: the longest one in learning rates, at 32 bits, with gradients up to 1.
        more_states: what only some settings keep, and whether it can be negative.
        torch_peer: the class of torch.optim that steps alike; empty if there is none.
        torch_cases: options with which they are compared, by the names both have.
    """

    flips: Mapping[str, Sequence[Flip]] = field(default_factory=dict)
    refused: Mapping[str, Sequence[Flip]] = field(default_factory=dict)
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    peak_lr: float | None = None
    longest_step: float = ADAMS_LONGEST_STEP
    more_states: Mapping[str, bool] = field(default_factory=dict)
    torch_peer: str = ""
    torch_cases: Sequence[Mapping[str, Any]] = ()
