"""Layer numbers for layer-wise learning-rate decay, read off the names of parameters.

A network of n blocks has the layers 0 (what comes before the blocks, such as embeddings), 1 to n
(the blocks) and n + 1 (what comes behind them, such as the head); layer i learns with
``lr * decay**(n + 1 - i)`` (Clark et al. 2020, ELECTRA; Bao et al. 2022, BEiT).
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

Sized = tuple[str, int]


class LayerNumbers:
    """The layers of a sequence of parameters.

    Args:
        parameters: name and number of elements of every parameter, in the model's order.
        blocks: a glob on the names of the lists of blocks; None takes the list that holds most
            elements and is in no other.

    Attributes:
        layers: the layer of each parameter.
        lists: the names of the lists of blocks, in order; empty if there are none.
        last: the number of the layer behind the blocks.
    """

    def __init__(self, parameters: Sequence[Sized], blocks: str | None = None) -> None:
        places = [_block_of(name, blocks) for name, _ in parameters]
        if blocks is None:
            largest = _largest(parameters, places)
            places = [place if place and place[0] == largest else None for place in places]
        numbers = {place: i for i, place in enumerate(dict.fromkeys(filter(None, places)), start=1)}
        self.lists = list(dict.fromkeys(name for name, _ in numbers))
        self.last = len(numbers) + 1
        behind = max((i for i, place in enumerate(places) if place), default=-1)
        self.layers: list[int] = []
        layer = 0
        for index, place in enumerate(places):
            if place:
                layer = numbers[place]
            # Between blocks, a parameter belongs to the block before it.
            self.layers.append(layer if index <= behind else self.last)


def _block_of(name: str, blocks: str | None) -> tuple[str, int] | None:
    """The list and the number of the block that a parameter is in, the outermost one that fits.

    In "encoder.layer.11.output.weight" that is block 11 of "encoder.layer".
    """
    parts = name.split(".")
    for place, part in enumerate(parts[:-1]):
        inside = ".".join(parts[:place])
        if part.isdecimal() and (blocks is None or fnmatchcase(inside, blocks)):
            return inside, int(part)
    return None


def _largest(parameters: Sequence[Sized], places: Sequence[tuple[str, int] | None]) -> str | None:
    sizes: dict[str, int] = {}
    for (_, numel), place in zip(parameters, places, strict=True):
        if place:
            sizes[place[0]] = sizes.get(place[0], 0) + numel
    return max(sizes, key=sizes.__getitem__, default=None)
