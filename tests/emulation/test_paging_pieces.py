"""How paged states are cut into pieces, and the two buffers that pieces take in turns."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from optfactory import build_optimizer
from optfactory.backends.cuda.paging import PinnedStates, cut
from optfactory.backends.cuda.tables import UNQUANTIZED_BLOCK, ChunkRange
from optfactory.memory import placement
from optfactory.step.slots import Slot
from tests.emulation.harness import Shape, values
from tests.emulation.paging import Pages

SETS: dict[str, list[Shape]] = {
    "one small": [(5000,)],
    "one large": [(200_003,)],
    "many small": [(3100,)] * 40,
    "mixed": [(131, 501), (4099,), (70, 64), (40_000,), (33, 300), (5000,), (16, 8, 7, 9)],
    "exact": [(16_384,), (16_384,), (8192,)],
    "short rows": [(3000, 65)],
    "none": [],
}
NAMES = ["paged_adam", "paged_adam8bit"]
PIECES = [1, 2**14, 2**16, 2**25]

sets = pytest.mark.parametrize("shapes", SETS.values(), ids=SETS)
names = pytest.mark.parametrize("name", NAMES)
piece_sizes = pytest.mark.parametrize("piece_bytes", PIECES)


@pytest.fixture(autouse=True)
def pinned(monkeypatch: pytest.MonkeyPatch) -> Pages:
    return Pages(monkeypatch, placement.PINNED)


def slots_of(name: str, shapes: list[Shape]) -> list[tuple[int, Slot, ChunkRange]]:
    """Parameters with indices in a bucket, of which every second is another's."""
    if not shapes:
        return []
    params = [values(shape, torch.float32, i).requires_grad_() for i, shape in enumerate(shapes)]
    optimizer = build_optimizer(name, params, min_8bit_size=1)
    optimizer.init_states()
    found = []
    for index, slot in enumerate(optimizer._current_plan().slots):
        quantized = slot.layout.quantized
        block_size = slot.layout.grid.block_size if quantized else UNQUANTIZED_BLOCK
        found.append((2 * index + 1, slot, ChunkRange.of(slot, block_size, quantized)))
    return found


def chunk_bytes(item: tuple[int, Slot, ChunkRange]) -> int:
    _, slot, chunks = item
    return chunks.block_size * chunks.per_chunk * (2 if slot.layout.quantized else 8)


@sets
@names
@piece_sizes
def test_pieces_hold_every_chunk_once_and_in_order(
    name: str, shapes: list[Shape], piece_bytes: int
) -> None:
    slots = slots_of(name, shapes)
    pieces = cut(slots, 7, piece_bytes)
    number = 7
    for piece in pieces:
        assert piece.chunks.start == number
        assert sum(len(part.chunks) for part in piece.parts) == len(piece.chunks) > 0
        number = piece.chunks.stop
    assert number == 7 + sum(chunks.count for *_, chunks in slots)
    parts = [part for piece in pieces for part in piece.parts]
    for index, slot, chunks in slots:
        mine = [part for part in parts if part.tensor == index]
        assert all(part.slot is slot for part in mine)
        assert [number for part in mine for number in part.chunks] == list(range(chunks.count))
        ends = [0, *(part.end for part in mine)]
        assert [part.first for part in mine] == ends[:-1]
        assert ends[-1] == slot.parameter.numel()


@sets
@names
@piece_sizes
def test_no_piece_exceeds_its_size(name: str, shapes: list[Shape], piece_bytes: int) -> None:
    """Where a chunk alone is larger, it is a piece by itself."""
    slots = slots_of(name, shapes)
    largest = max(map(chunk_bytes, slots), default=0)
    pieces = cut(slots, 0, piece_bytes)
    sizes = [
        sum(state.numel() for part in piece.parts for state in part.states()) for piece in pieces
    ]
    assert max(sizes, default=0) <= max(piece_bytes, largest)
    for piece, size in zip(pieces, sizes, strict=True):
        assert size <= piece_bytes or len(piece.chunks) == 1
    for size, (index, following) in zip(sizes, enumerate(pieces[1:], 1), strict=False):
        first = sum(state.numel() for state in following.parts[0].states())
        assert size + first > piece_bytes or size > piece_bytes // 2, index


@sets
@names
@piece_sizes
def test_parts_know_their_states(name: str, shapes: list[Shape], piece_bytes: int) -> None:
    for piece in cut(slots_of(name, shapes), 0, piece_bytes):
        for part in piece.parts:
            for state, spec in zip(part.states(), part.slot.layout.rule.states, strict=True):
                key = f"{spec.name}_q8" if part.slot.layout.quantized else spec.name
                whole = part.slot.state[key]
                size = whole.element_size()
                assert state.data_ptr() == whole.data_ptr() + size * part.first
                assert state.numel() == size * (part.end - part.first)


def pinned_states(name: str, shapes: list[Shape], piece_bytes: int) -> PinnedStates:
    return PinnedStates(cut(slots_of(name, shapes), 0, piece_bytes), torch.device("cpu"))


@names
def test_buffers_take_turns(name: str) -> None:
    states = pinned_states(name, SETS["mixed"], 2**14)
    assert len(states.pieces) > 4
    buffers = [range(b.data_ptr(), b.data_ptr() + len(b)) for b in states._buffers]
    for number, piece in enumerate(states.pieces):
        buffer = buffers[number % 2]
        taken: list[range] = []
        for part, row in zip(piece.parts, states.pointers(number), strict=True):
            for pointer, state in zip(row, part.states(), strict=False):
                first = pointer + part.first * (1 if part.slot.layout.quantized else 4)
                assert first % 16 == state.data_ptr() % 16  # packs stay packs
                taken.append(range(first, first + len(state)))
        for memory_of_state in taken:
            assert memory_of_state.start in buffer
            assert memory_of_state[-1] in buffer
        taken.sort(key=lambda bytes_: bytes_.start)
        assert all(a.stop <= b.start for a, b in itertools.pairwise(taken))


@names
def test_buffers_are_not_much_larger_than_a_piece(name: str) -> None:
    states = pinned_states(name, SETS["mixed"], 2**14)
    count = max(
        len(part.states()) * len(piece.parts) for piece in states.pieces for part in piece.parts
    )
    for buffer in states._buffers:
        assert len(buffer) <= 2**14 + 16 * (count + 1)


def test_scales_stay_on_the_device() -> None:
    states = pinned_states("paged_adam8bit", SETS["mixed"], 2**14)
    for number, piece in enumerate(states.pieces):
        for part, row in zip(piece.parts, states.pointers(number), strict=True):
            layout, state = part.slot.layout, part.slot.state
            scales = [state[codec.keys(spec)[1]] for spec, codec in layout.stored]
            assert row[len(scales) :] == [tensor.data_ptr() for tensor in scales]


@names
def test_what_is_fetched_is_put_back_to_its_place(name: str) -> None:
    states = pinned_states(name, SETS["mixed"], 2**14)

    def all_states() -> list[Any]:
        return [s for piece in states.pieces for part in piece.parts for s in part.states()]

    for number, state in enumerate(all_states()):
        state.fill_(number % 251)
    for number in range(len(states.pieces)):
        states.fetch(number)
        states._buffers[number % 2].add_(1)
        states.put_back(number)
    for number, state in enumerate(all_states()):
        assert state.eq(number % 251 + 1).all()
