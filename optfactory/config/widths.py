"""How wide state is: what the fields that say so may say together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from optfactory.config.names import WIDTHS, width_of

# What says how wide state is.
WIDTH_FIELDS = ("optim_bits", "state_bits", "state_format")

# Fields that do nothing where no state is made of codes, or of codes of a dynamic map: there, all
# but their defaults are refused. `min_8bit_size` holds there too: it says which tensors have 32-bit
# state.
MAP_FIELDS = ("signed_map", "second_moment_floor", "state_rounding")
CODE_FIELDS = ("block_size", "block_wise", *MAP_FIELDS)


def stated_widths(known: Mapping[str, Any]) -> set[str]:
    """The widths that states may have: `optim_bits`, and those of single ones.

    Args:
        known: what `WIDTH_FIELDS` say; None where that is not known yet.
    """
    bits = [known["optim_bits"], *(known["state_bits"] or {}).values()]
    return {width_of({**known, "optim_bits": each}) for each in bits if each}


def least_bits(widths: Iterable[str]) -> int:
    """The bits of the narrowest of some widths; 32 of none."""
    return min((int(str(WIDTHS[width]["optim_bits"])) for width in widths), default=32)


def refuse_coarse(family: str, too_coarse: Mapping[str, float], widths: Iterable[str]) -> None:
    """Refuse widths that a family does not have.

    Raises:
        ValueError: says by how much they miss.
    """
    for width in sorted(widths):
        if width in too_coarse:
            raise ValueError(
                f"{width} is too coarse for {family}: after 2000 steps the loss is "
                f"{too_coarse[width]} % off that of 32 bits; set optim_bits: 8, 16 or 32"
            )


def refuse_other_bits(
    family: str, locked: Mapping[str, object], value: Mapping[str, int] | None
) -> None:
    """Refuse bits of single states that say nothing, or are not those of the name.

    Raises:
        ValueError: says so.
    """
    if value is None:
        return
    if not value:
        raise ValueError("a mapping without states says nothing; drop it")
    stated = locked.get("optim_bits")
    if stated and any(bits != stated for bits in value.values()):
        raise ValueError(
            f"{value} contradicts the name '{locked['name']}'; drop the key, or use "
            f"optimizer={family} with optim_bits: {stated} and state_bits: {value}"
        )


def refuse_without_codes(field: str, widths: set[str], bits: object) -> None:
    """Refuse one of `CODE_FIELDS` where no state has what it is for.

    Raises:
        ValueError: says for which state it is.
    """
    needed = {"8bit"} if field in MAP_FIELDS else {"4bit", "8bit", "fp8"}
    if widths and not widths & needed:
        where = "with fp8" if widths == {"fp8"} else f"at {bits} bits"
        raise ValueError(
            f"{field} is for 8-bit state; drop it {where}, or say it in the rule or group "
            "that has optim_bits: 8"
        )
