"""Layer numbers for layer-wise learning-rate decay, read off the names of parameters.

A network of n blocks has the layers 0 (what comes before the blocks, such as embeddings), 1 to n
(the blocks) and n + 1 (what comes behind them, such as the head); layer i learns with
``lr * decay**(n + 1 - i)`` (Clark et al. 2020, ELECTRA; Bao et al. 2022, BEiT).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

# "encoder.layer.11.output.weight": a list of blocks, a number, and a parameter in that block.
_IN_A_LIST = re.compile(r"(?:(?P<list>.*?)\.)?(?P<number>\d+)\.")

Sized = tuple[str, int]


class LayerNumbers:
    """The layer of each parameter.

    Args:
        parameters: name and number of elements of every parameter, in the model's order.
        blocks: a glob on the names of the lists of blocks; None takes the list that holds most
            elements and is in no other.

    Attributes:
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
        self._layers: dict[str, int] = {}
        layer = 0
        for index, ((name, _), place) in enumerate(zip(parameters, places, strict=True)):
            if place:
                layer = numbers[place]
            # Between blocks, a parameter belongs to the block before it.
            self._layers[name] = layer if index <= behind else self.last

    def of(self, name: str) -> int:
        """The layer of the parameter of this name."""
        return self._layers[name]


def _block_of(name: str, blocks: str | None) -> tuple[str, int] | None:
    """The list and the number of the block that a parameter is in, if any."""
    for found in _IN_A_LIST.finditer(name) if blocks is None else _all_lists(name):
        inside = (found["list"] or "", int(found["number"]))
        if blocks is None or fnmatchcase(inside[0], blocks):
            return inside
    return None


def _all_lists(name: str) -> list[re.Match[str]]:
    """Every list that a parameter is in, the outermost first."""
    ends = [match.end() for match in re.finditer(r"(?:^|\.)\d+\.", name)]
    pattern = re.compile(r"(?:(?P<list>.*)\.)?(?P<number>\d+)\.")
    return [match for end in ends if (match := pattern.fullmatch(name, 0, end))]


def _largest(parameters: Sequence[Sized], places: Sequence[tuple[str, int] | None]) -> str | None:
    sizes: dict[str, int] = {}
    for (_, numel), place in zip(parameters, places, strict=True):
        if place:
            sizes[place[0]] = sizes.get(place[0], 0) + numel
    return max(sizes, key=sizes.__getitem__, default=None)
