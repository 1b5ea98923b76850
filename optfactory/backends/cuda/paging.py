"""Paged state on its way through a GPU: piece by piece, copies beside the kernels.

While a kernel updates one piece, the next is fetched and the one before is put back. Pinned state
is copied through two buffers on the device. Managed state stays where it is, and its pages are
asked for ahead of the kernel, instead of one page fault after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from optfactory.backends.cuda.tables import ChunkRange
from optfactory.backends.held import state_pointers
from optfactory.memory import placement
from optfactory.memory.managed import prefetch
from optfactory.step.slots import Slot

# Large enough that copies run at full speed, small beside a model.
PIECE_BYTES = 2**25

_ALIGNMENT = 16


@dataclass(frozen=True)
class Part:
    """Consecutive chunks of one tensor.

    Attributes:
        slot: the parameter; tensor is its index in the bucket.
        chunks: numbers of the chunks in the tensor.
        first, end: their elements, in row-major order.
    """

    slot: Slot
    tensor: int
    chunks: range
    first: int
    end: int

    def states(self) -> list[Tensor]:
        """The bytes of this part of each state."""
        found = []
        for index, (_, codec) in enumerate(self.slot.layout.stored):
            begin, end = (codec.bits * element // 8 for element in (self.first, self.end))
            whole = _large_state(self.slot, index).view(-1).view(torch.uint8)
            found.append(whole[begin:end])
        return found


@dataclass(frozen=True)
class Piece:
    """What is on the device at once: `chunks` are numbers in the bucket."""

    chunks: range
    parts: tuple[Part, ...]


def cut(
    slots: Sequence[tuple[int, Slot, ChunkRange]], first_chunk: int, piece_bytes: int
) -> list[Piece]:
    """Cut the states of parameters into pieces of about `piece_bytes`, in the order given.

    Args:
        slots: each parameter with its index in the bucket and its chunks.
        first_chunk: the number of the first parameter's first chunk in the bucket.
    """
    pieces: list[Piece] = []
    parts: list[Part] = []
    begin = number = first_chunk
    size = 0
    for part in _parts(slots, piece_bytes):
        if parts and size + _part_bytes(part) > piece_bytes:
            pieces.append(Piece(range(begin, number), tuple(parts)))
            begin, parts, size = number, [], 0
        parts.append(part)
        number += len(part.chunks)
        size += _part_bytes(part)
    if parts:
        pieces.append(Piece(range(begin, number), tuple(parts)))
    return pieces


def _parts(slots: Sequence[tuple[int, Slot, ChunkRange]], piece_bytes: int) -> Iterator[Part]:
    """Each parameter's chunks in runs that fit into a piece; a chunk always does."""
    for tensor, slot, chunks in slots:
        chunk_bytes = _bytes_of(slot, chunks.block_size * chunks.per_chunk)
        run = max(1, piece_bytes // (chunk_bytes + _ALIGNMENT))
        for begin in range(0, chunks.count, run):
            end = min(begin + run, chunks.count)
            first = chunks.first_element(begin * chunks.per_chunk)
            last = chunks.first_element(min(end * chunks.per_chunk, chunks.blocks))
            yield Part(slot, tensor, range(begin, end), first, last)


def _large_state(slot: Slot, index: int) -> Tensor:
    state, codec = slot.layout.stored[index]
    return slot.state[codec.keys(state)[0]]


def _bytes_of(slot: Slot, elements: int) -> int:
    """Of so many elements' states."""
    return elements * sum(codec.bits for codec in slot.layout.codecs) // 8


def _part_bytes(part: Part) -> int:
    return _bytes_of(part.slot, part.end - part.first)


class PinnedStates:
    """Pinned state, copied in and out through two buffers that take turns."""

    def __init__(self, pieces: list[Piece], device: torch.device) -> None:
        self.pieces = pieces
        self._copies: list[list[tuple[Tensor, int]]] = []
        room = 0
        for piece in pieces:
            copies, offset = [], 0
            for part in piece.parts:
                for state in part.states():
                    # Vectors stay vectors: addresses keep their remainder.
                    offset += (state.data_ptr() - offset) % _ALIGNMENT
                    copies.append((state, offset))
                    offset += len(state)
            self._copies.append(copies)
            room = max(room, offset)
        self._buffers = [
            torch.empty(room + _ALIGNMENT, dtype=torch.uint8, device=device) for _ in range(2)
        ]

    def pointers(self, number: int) -> list[list[int]]:
        """A row of state pointers for each part of a piece, while it is in its buffer.

        A kernel counts elements from the tensor's beginning, so the pointers are as far before the
        buffer as the part is behind that beginning.
        """
        copies = iter(self._copies[number])
        rows = []
        for part in self.pieces[number].parts:
            row = state_pointers(part.slot)
            for index in range(len(part.slot.layout.rule.states)):
                state, offset = next(copies)
                ahead = state.data_ptr() - row[index]
                row[index] = self._base(number) + offset - ahead
            rows.append(row)
        return rows

    def fetch(self, number: int) -> None:
        """Copy a piece to the device."""
        for state, place in self._places(number):
            place.copy_(state, non_blocking=True)

    def put_back(self, number: int) -> None:
        """Copy a piece to the host."""
        for state, place in self._places(number):
            state.copy_(place, non_blocking=True)

    def _base(self, number: int) -> int:
        address = self._buffers[number % 2].data_ptr()
        return address + -address % _ALIGNMENT

    def _places(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        buffer = self._buffers[number % 2]
        shift = self._base(number) - buffer.data_ptr()
        for state, offset in self._copies[number]:
            yield state, buffer[shift + offset : shift + offset + len(state)]


class ManagedStates:
    """Managed state: its pages are brought to the device ahead of the kernel that uses them."""

    def __init__(self, pieces: list[Piece], device: torch.device) -> None:
        self.pieces = pieces
        self._device = device

    def pointers(self, number: int) -> list[list[int]]:
        """The tensors' own pointers."""
        return [state_pointers(part.slot) for part in self.pieces[number].parts]

    def fetch(self, number: int) -> None:
        """Ask for the pages of a piece."""
        for part in self.pieces[number].parts:
            for state in part.states():
                prefetch(state, self._device)

    def put_back(self, number: int) -> None:
        """Nothing: the system takes pages when it needs their room."""


class Conveyor:
    """Runs a kernel over all pieces of paged states, fetching ahead and putting back behind."""

    def __init__(self, states: PinnedStates | ManagedStates, device: torch.device) -> None:
        self.states = states
        self._streams = _Streams(device)

    def tensors(self) -> list[int]:
        """The tensors in the order in which their chunks are numbered."""
        return list(dict.fromkeys(part.tensor for p in self.states.pieces for part in p.parts))

    def pointer_rows(self) -> list[tuple[range, list[int]]]:
        """The state pointers of every part, with the numbers of the chunks that use them."""
        rows = []
        for number, piece in enumerate(self.states.pieces):
            begin = piece.chunks.start
            for part, row in zip(piece.parts, self.states.pointers(number), strict=True):
                rows.append((range(begin, begin + len(part.chunks)), row))
                begin += len(part.chunks)
        return rows

    def run(self, launch: Callable[[range], None], writes: bool) -> None:
        """Launch for the chunks of each piece; `writes` says whether states are changed."""
        here, inbound, outbound = self._streams.begin()
        free: list[Any] = [None, None]  # when a buffer may be filled again
        for number, piece in enumerate(self.states.pieces):
            fetched = inbound.do(partial(self.states.fetch, number), free[number % 2])
            updated = here.do(partial(launch, piece.chunks), fetched)
            free[number % 2] = updated
            if writes:
                free[number % 2] = outbound.do(partial(self.states.put_back, number), updated)
        self._streams.end(here)


class _Lane:
    """A stream as a place to do things in order; without one they are done at once."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def do(self, work: Callable[[], None], after: Any) -> Any:
        """Work on this stream after an event of another; returns the event of its end."""
        if self.stream is None:
            work()
            return None
        if after is not None:
            self.stream.wait_event(after)
        with torch.cuda.stream(self.stream):
            work()
        return self.stream.record_event()


class _Streams:
    """torch's current stream of a device, and two more for copies in and out."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies: list[Any] = []
        if device.type == "cuda":
            self._copies = [torch.cuda.Stream(device) for _ in range(2)]  # type: ignore[no-untyped-call]

    def begin(self) -> tuple[_Lane, _Lane, _Lane]:
        """The current stream, and those for copies, which wait for all that it does so far."""
        if not self._copies:
            return _Lane(None), _Lane(None), _Lane(None)
        here = torch.cuda.current_stream(self._device)
        for stream in self._copies:
            stream.wait_stream(here)
        return _Lane(here), _Lane(self._copies[0]), _Lane(self._copies[1])

    def end(self, here: _Lane) -> None:
        """The current stream goes on when all copies are done."""
        for stream in self._copies:
            here.stream.wait_stream(stream)


def conveyors(
    slots: Sequence[tuple[int, Slot, ChunkRange]], first_chunk: int, device: torch.device
) -> list[Conveyor]:
    """The conveyors of a bucket's paged parameters; pinned ones come before managed ones."""
    found = []
    for where, kind in ((placement.PINNED, PinnedStates), (placement.MANAGED, ManagedStates)):
        chosen = [item for item in slots if item[1].layout.where == where]
        pieces = cut(chosen, first_chunk, PIECE_BYTES)
        if pieces:
            found.append(Conveyor(kind(pieces, device), device))
            first_chunk = pieces[-1].chunks.stop
    return found
