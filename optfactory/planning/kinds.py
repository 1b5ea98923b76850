"""Kinds of memory as pictures tell them apart: a colour for each, stripes for what can leave."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from optfactory.memory import placement
from optfactory.planning.sizes import BUFFERS, GRADIENTS, PARAMETERS, SCRATCH, STATE, Share


@dataclass(frozen=True)
class Kind:
    """One kind of memory in a stacked bar.

    Attributes:
        label: what legends call it.
        color: one of Okabe & Ito's colours, which colour-blind readers can tell apart.
        striped: whether it can leave the device; it has the colour of what stays, with stripes.
    """

    label: str
    color: str
    striped: bool = False


_OF_STATE = {32: "#D55E00", 16: "#F0E442", 8: "#E69F00", 4: "#009E73"}

# In the order in which bars stack them.
KINDS = (
    Kind(PARAMETERS, "#999999"),
    Kind(BUFFERS, "#666666"),
    Kind(GRADIENTS, "#56B4E9"),
    Kind(SCRATCH, "#CC79A7"),
    *(Kind(f"{bits}-bit {STATE}", color) for bits, color in _OF_STATE.items()),
    *(Kind(f"paged {bits}-bit {STATE}", color, True) for bits, color in _OF_STATE.items()),
)
_BY_LABEL = {kind.label: kind for kind in KINDS}


def kind_of(share: Share) -> Kind:
    """The kind of a part of the memory."""
    if share.what != STATE:
        return _BY_LABEL[share.what]
    paged = "" if share.place == placement.RESIDENT else "paged "
    return _BY_LABEL[f"{paged}{share.bits}-bit {STATE}"]


def by_kind(shares: Iterable[Share]) -> dict[Kind, int]:
    """Bytes of each kind that there is, in the order of bars."""
    sizes: Counter[Kind] = Counter()
    for share in shares:
        sizes[kind_of(share)] += share.nbytes
    return {kind: sizes[kind] for kind in KINDS if sizes[kind]}
