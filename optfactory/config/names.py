"""Optimizer names: ``[paged_]<family>[4bit|8bit|fp8|16bit|32bit]`` and their aliases.

Names are resolved by exact table look-up, never by substring or suffix search: libraries that
search substrings have handed out 32-bit or unpaged optimizers for 8-bit or paged names.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from optfactory.errors import UnknownOptimizerError

# What a typing mistake leaves of a width, between "8" and "32bits".
_WIDTH = re.compile(r"\d{1,2}(?:b[a-z]{0,3})?|bits?|fp\d?|")
_PREFIXES = ("paged", "bnb")

# What a name's width states; `optfactory.state.codecs` says what they are.
WIDTHS: dict[str, dict[str, object]] = {
    "4bit": {"optim_bits": 4},
    "8bit": {"optim_bits": 8, "state_format": "dynamic"},
    "fp8": {"optim_bits": 8, "state_format": "fp8"},
    "16bit": {"optim_bits": 16},
    "32bit": {"optim_bits": 32},
}


@dataclass(frozen=True)
class OptimizerName:
    """One name taken apart: the family, the state width it states (or nothing) and paging."""

    family: str
    width: str = ""
    paged: bool = False

    def __str__(self) -> str:
        return f"{'paged_' if self.paged else ''}{self.family}{self.width}"

    @property
    def states(self) -> dict[str, object]:
        """What the width states, by field."""
        return WIDTHS.get(self.width, {})


def width_of(values: Mapping[str, Any]) -> str:
    """The width that a config's values stand for: a key of `WIDTHS`."""
    if values.get("state_format") == "fp8" and str(values.get("optim_bits")) == "8":
        return "fp8"
    return f"{values.get('optim_bits', 32)}bit"


def names_of_family(family: str, without: Iterable[str] = ()) -> list[OptimizerName]:
    """All names of one family: each width stated or not, paged or not.

    Args:
        without: widths that the family does not have.
    """
    widths = ["", *(width for width in WIDTHS if width not in without)]
    return [OptimizerName(family, width, paged) for paged in (False, True) for width in widths]


def normalize(text: str) -> str:
    """The key under which spellings are compared: lower case without ``_`` and ``-``."""
    return text.strip().lower().replace("_", "").replace("-", "")


def alias_table(
    family: str, spellings: Iterable[str] = (), without: Iterable[str] = ()
) -> dict[str, str]:
    """Map every accepted normalized spelling of a family's names to the canonical name.

    Accepted are the name itself in any case and with or without ``_`` and ``-`` (which covers
    bitsandbytes' class names and Hugging Face's ``paged_adamw_8bit``), the same behind ``bnb``
    (timm), and with ``bnb`` behind the family (Hugging Face's ``rmsprop_bnb_8bit``).

    >>> alias_table("lion")["lionbnb8bit"]
    'lion8bit'

    Args:
        spellings: what others call the family.
        without: widths that the family does not have.
    """
    table = {}
    for stem in map(normalize, (family, *spellings)):
        for name in names_of_family(family, without):
            paged, width = "paged" * name.paged, name.width
            for key in (f"{paged}{stem}{width}", f"bnb{paged}{stem}{width}"):
                table[key] = str(name)
            table[f"{paged}{stem}bnb{width}"] = str(name)
    return table


def unknown_name(text: str, known: Iterable[str]) -> UnknownOptimizerError:
    """The error for a name that does not exist, with the one that was meant if that is certain.

    Args:
        known: the canonical names.
    """
    names = list(known)
    stated = tuple(WIDTHS)
    families = sorted(x for x in names if not x.startswith("paged_") and not x.endswith(stated))
    meant = _meant(normalize(text), families, names)
    hint = f" Did you mean '{meant}'?" if meant else ""
    return UnknownOptimizerError(
        f"unknown optimizer '{text}'; names are [paged_]<family>[{'|'.join(WIDTHS)}], "
        f"<family> being one of {', '.join(families)}.{hint}"
    )


def _all_names(family: str) -> set[str]:
    return {str(name) for name in names_of_family(family)}


def _meant(key: str, families: list[str], known: list[str]) -> str:
    """The name that was mistyped; empty if it could be another algorithm's.

    Similarity does not do: LARS is no LAMB, and NAdam, AdamP and AdaMax are no Adam.
    """
    found = {family for family in families for stem in _stems(key) if _slip(stem, family)}
    if len(found) != 1:
        return ""
    family = found.pop()
    by_key = {normalize(name): name for name in known if name in _all_names(family)}
    width = re.search(r"\d+", key)
    if width:
        end = f"fp{width.group()}" if "fp" in key else f"{width.group()}bit"
        by_key = {name: by_key[name] for name in by_key if name.endswith(end)} or by_key
    return by_key[difflib.get_close_matches(key, by_key, n=1, cutoff=0.0)[0]]


def _stems(key: str) -> set[str]:
    """What can be meant as a family, between what can be meant as a prefix and a width."""
    return {
        key[begin:end]
        for begin in range(min(len(key), 7))
        if not begin or difflib.get_close_matches(key[:begin], _PREFIXES, cutoff=0.8)
        for end in range(begin + 1, len(key) + 1)
        if _WIDTH.fullmatch(key[end:])
    }


def _slip(stem: str, family: str) -> bool:
    """Whether a family's name was written with at most one slip of the fingers.

    Other letters, before, behind and in a name, make names of other algorithms. Slips are a letter
    twice, one left out between others, and two neighbours swapped.
    """
    right = normalize(family)
    places = range(1, len(right))
    left_out = (right[:i] + right[i + 1 :] for i in places[:-1])
    doubled = (right[:i] + right[i - 1 :] for i in range(1, len(right) + 1))
    swapped = (right[: i - 1] + right[i] + right[i - 1] + right[i + 1 :] for i in places)
    return stem in {right, *left_out, *doubled, *swapped}
