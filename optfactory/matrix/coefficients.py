"""The polynomials that an orthogonalization applies to singular values, step by step.

A step takes every singular value s of a matrix X to a*s + b*s^3 + c*s^5, which is
X <- a X + (b G + c G^2) X with G = X X^T. Named sets:

- `muon`: (3.4445, -4.7750, 2.0315) in every step (Keller Jordan 2024, `torch.optim.Muon`). It does
  not converge: five steps take what lies in [0.003, 1] into [0.68, 1.21].
- `you`: five different steps that Jiacheng You searched for (2025; Dion has them, and Megatron
  calls them `quintic`). They take [0.003, 1] into [0.97, 1.15].
- `polar_express`: the best polynomial of each step for what the steps before it left (Amsel et al.
  2025, arXiv:2505.16932, Algorithm 1), with the paper's safety factor of 1.01 in all but the last
  triple, which serves every further step. It converges: [0.001, 1] goes into [0.84, 1.13] with five
  steps, into [0.99, 1.01] with six, and to 1 within 10^-4 with eight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from optfactory.errors import ConfigError

Triple = tuple[float, float, float]

MOST_STEPS = 99  # as in torch.optim.Muon

# No set takes a singular value beyond 2, in any step; a wrong sign takes it beyond 10^5.
_LARGEST_VALUE = 10.0
_SAFETY = 1.01


@dataclass(frozen=True)
class CoefficientSet:
    """Triples of successive steps.

    Attributes:
        triples: of the first steps.
        repeats: whether the last triple serves all further steps too.
    """

    triples: tuple[Triple, ...]
    repeats: bool = False


_POLAR_EXPRESS: tuple[Triple, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)

NAMED = {
    "muon": CoefficientSet(((3.4445, -4.7750, 2.0315),), repeats=True),
    "you": CoefficientSet(
        (
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        )
    ),
    "polar_express": CoefficientSet(
        (
            *((a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5) for a, b, c in _POLAR_EXPRESS),
            (1.875, -1.25, 0.375),
        ),
        repeats=True,
    ),
}


def steps_of(coefficients: str | Sequence[Sequence[float]], count: int) -> tuple[Triple, ...]:
    """The triple (a, b, c) of each of `count` steps.

    Args:
        coefficients: a name of `NAMED`, one triple for all steps, or a list of `count` triples.
        count: the number of steps, 1 to 99.

    Raises:
        ConfigError: an unknown name; numbers that are not finite triples; a list whose length is
            neither 1 nor `count`; polynomials that let singular values grow without bound.
    """
    if not 1 <= count <= MOST_STEPS:
        raise ConfigError(f"ns_steps: {count} is not a number of steps from 1 to {MOST_STEPS}")
    if isinstance(coefficients, str):
        return _of_name(coefficients, count)
    triples = tuple(_triple(entry, index) for index, entry in enumerate(coefficients))
    if len(triples) not in (1, count):
        raise ConfigError(
            f"ns_coefficients: {len(triples)} triples for {count} steps; list one for all steps, "
            f"or one for each (ns_steps: {max(len(triples), 1)})"
        )
    steps = triples * count if len(triples) == 1 else triples
    _refuse_growth(steps)
    return steps


def _of_name(name: str, count: int) -> tuple[Triple, ...]:
    named = NAMED.get(name)
    if named is None:
        raise ConfigError(
            f"ns_coefficients: unknown set {name!r}; sets are {', '.join(NAMED)}, "
            "or list triples such as [[3.4445, -4.775, 2.0315]]"
        )
    known = len(named.triples)
    if count > known and not named.repeats:
        raise ConfigError(
            f"ns_coefficients: {name!r} has {known} steps, not {count}; set ns_steps to {known} or "
            "less"
        )
    return (*named.triples, *(named.triples[-1:] * (count - known)))[:count]


def _triple(entry: Sequence[float], index: int) -> Triple:
    numbers = () if isinstance(entry, str | float | int) else tuple(entry)
    if len(numbers) != 3 or not all(_is_finite(number) for number in numbers):
        raise ConfigError(
            f"ns_coefficients[{index}]: {entry!r} is not three finite numbers a, b, c"
        )
    a, b, c = (float(number) for number in numbers)
    return a, b, c


def _is_finite(number: object) -> bool:
    if isinstance(number, bool) or not isinstance(number, int | float):
        return False
    return math.isfinite(number)


def _refuse_growth(steps: Sequence[Triple]) -> None:
    """Raise where a singular value in [0, 1] would not stay near 1."""
    for index in range(1025):
        start = value = index / 1024
        for a, b, c in steps:
            value *= a + value * value * (b + value * value * c)
            if abs(value) > _LARGEST_VALUE:
                raise ConfigError(
                    f"ns_coefficients: these polynomials take a singular value of {start:.3g} "
                    f"beyond {_LARGEST_VALUE:g}, where it should come near to 1; check their signs"
                )
