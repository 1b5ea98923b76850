"""Optimizer names: ``[paged_]<family>[8bit|32bit]`` and their aliases.

Names are resolved by exact table look-up, never by substring or suffix search: libraries that
search substrings have handed out 32-bit or unpaged optimizers for 8-bit or paged names.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from optfactory.errors import UnknownOptimizerError

# Spellings that differ from a canonical name by more than case, "_" and "-":
# Hugging Face's `optim=` value for bitsandbytes' 8-bit AdamW.
_EXTRA_ALIASES = {"adamwbnb8bit": "adamw8bit"}


@dataclass(frozen=True)
class OptimizerName:
    """One name taken apart: the family, the state width it states (or None) and paging."""

    family: str
    bits: int | None = None
    paged: bool = False

    def __str__(self) -> str:
        width = f"{self.bits}bit" if self.bits else ""
        return f"{'paged_' if self.paged else ''}{self.family}{width}"


def names_of_family(family: str) -> list[OptimizerName]:
    """All six names of one family: each width stated or not, paged or not."""
    return [OptimizerName(family, bits, paged) for paged in (False, True) for bits in (None, 8, 32)]


def normalize(text: str) -> str:
    """The key under which spellings are compared: lower case without ``_`` and ``-``."""
    return text.strip().lower().replace("_", "").replace("-", "")


def alias_table(names: Iterable[str]) -> dict[str, str]:
    """Map every accepted normalized spelling to its canonical name.

    Accepted are the name itself in any case and with or without ``_`` and ``-`` (which covers
    bitsandbytes' class names and Hugging Face's ``paged_adamw_8bit``), the same behind ``bnb``,
    and the few names that follow no pattern.
    """
    canonical = list(names)
    table = {normalize(name): name for name in canonical}
    table |= {f"bnb{key}": name for key, name in list(table.items())}
    table |= {key: name for key, name in _EXTRA_ALIASES.items() if name in canonical}
    return table


def unknown_name(text: str, known: Iterable[str]) -> UnknownOptimizerError:
    """The error for a name that does not exist, with the closest one that does."""
    by_key = {normalize(name): name for name in known}
    close = difflib.get_close_matches(normalize(text), by_key, n=1, cutoff=0.6)
    hint = f" Did you mean '{by_key[close[0]]}'?" if close else ""
    families = sorted(key for key in by_key if not key.startswith("paged") and "bit" not in key)
    return UnknownOptimizerError(
        f"unknown optimizer '{text}'; names are [paged_]<family>[8bit|32bit], "
        f"<family> being one of {', '.join(families)}.{hint}"
    )
