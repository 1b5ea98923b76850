"""What several ranks hold the same of: whole parameters, counters, the scales of cut blocks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from optfactory.planning.sizes import PARAMETERS, STATE, stored_bytes
from optfactory.planning.spread import Holder
from optfactory.sharding.dtensors import Sharding
from optfactory.state.layout import HISTORY_KEY, NEURONS_KEY
from optfactory.step.slots import Slot

SCALES, STEPS, NORMS = "scales of cut blocks", "step counters", "gradient norms"
NEURONS = "moments of neurons"
_ORDER = (PARAMETERS, STATE, SCALES, STEPS, NORMS, NEURONS)


@dataclass(frozen=True)
class Copies:
    """One kind of data that more than one rank holds.

    Attributes:
        what: ``parameters``, ``state``, ``scales of cut blocks``, ``step counters``, ``gradient
            norms`` or ``moments of neurons``. What is whole on all ranks of a mesh's dimension
            counts, as in HSDP.
        ranks: how many hold the same.
        tensors: of how many parameters.
        nbytes: on the rank that holds the most in all.
    """

    what: str
    ranks: int
    tensors: int
    nbytes: int


def copies(
    holder: Holder, parameters: Iterable[Tensor], slots: Iterable[Slot]
) -> tuple[Copies, ...]:
    """What others hold, too, of the parameters and states on a rank."""
    found: dict[tuple[str, int], list[int]] = defaultdict(list)
    for parameter in parameters:
        nbytes = holder.held(parameter, stored_bytes(parameter))
        found[PARAMETERS, _holders(holder.sharding(parameter))].append(nbytes)
    for slot in slots:
        own = holder.sharding(slot.parameter)
        sizes: dict[tuple[str, int], int] = defaultdict(int)
        for key, spec in slot.layout.tensors.items():
            holders = _ranks(own) if spec.sharding is None else _holders(spec.sharding)
            sizes[_what(key, holders > _holders(own)), holders] += spec.nbytes
        for kind, nbytes in sizes.items():
            found[kind].append(nbytes)
    return tuple(
        Copies(what, ranks, len(sizes), sum(sizes))
        for (what, ranks), sizes in sorted(found.items(), key=lambda item: _ORDER.index(item[0][0]))
        if ranks > 1
    )


def _what(key: str, is_whole: bool) -> str:
    if key == "step":
        return STEPS
    if key == HISTORY_KEY:
        return NORMS
    if key == NEURONS_KEY:
        return NEURONS
    return SCALES if is_whole else STATE


def _ranks(sharding: Sharding | None) -> int:
    return 1 if sharding is None else int(sharding.mesh.size())


def _holders(sharding: Sharding | None) -> int:
    """How many ranks hold the same part of a tensor."""
    if sharding is None:
        return 1
    ranks = _ranks(sharding)
    for index, _ in sharding.cuts:
        ranks //= sharding.mesh.size(index)
    return ranks
