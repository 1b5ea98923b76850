"""What an optimizer's state costs, and where it lives."""

from __future__ import annotations

from dataclasses import dataclass

from optfactory.step.slots import Slot


@dataclass(frozen=True)
class MemoryRow:
    """The state of one parameter.

    Attributes:
        name: the parameter's name, the same on every rank.
        bits: of an element of its states, as 8; of each of them, as ``8/16``, where they differ. It
            follows from the whole parameter's shape.
        where: ``resident``, ``file-mapped``, ``managed`` or ``pinned``.
        nbytes: bytes of its state tensors on this rank, scales and step included.
        global_nbytes: of the whole parameter's, as one process would have them; the same as
            `nbytes` unless it is sharded.
        reason: why states are 32-bit although the config says less, or not paged although is_paged
            is true; else empty.
    """

    name: str
    bits: int | str
    where: str
    nbytes: int
    global_nbytes: int
    reason: str


@dataclass(frozen=True)
class MemoryReport:
    """The state of all trainable parameters, one row each.

    Of sharded parameters a rank holds parts. Every rank has the same rows, also of parameters of
    which it holds no element.
    """

    rows: tuple[MemoryRow, ...]

    @property
    def state_bytes(self) -> int:
        """Bytes of all state tensors on this rank."""
        return sum(row.nbytes for row in self.rows)

    @property
    def global_state_bytes(self) -> int:
        """Bytes of the whole model's state, as one process would have it."""
        return sum(row.global_nbytes for row in self.rows)

    def __str__(self) -> str:
        width = max(map(len, ("parameter", *(row.name for row in self.rows))))
        sharded = any(row.nbytes != row.global_nbytes for row in self.rows)

        def line(name: str, bits: str, here: str, whole: str, where: str) -> str:
            middle = f" {whole:>14}" if sharded else ""
            return f"{name:{width}} {bits:>4} {here:>14}{middle}{where}"

        head = "bytes here" if sharded else "bytes"
        lines = [line("parameter", "bits", head, "whole", "  place")]
        for row in self.rows:
            note = f" ({row.reason})" if row.reason else ""
            here, whole = f"{row.nbytes:,}", f"{row.global_nbytes:,}"
            lines.append(line(row.name, str(row.bits), here, whole, f"  {row.where}{note}"))
        lines.append(line("total", "", f"{self.state_bytes:,}", f"{self.global_state_bytes:,}", ""))
        return "\n".join(lines)


def report(slots: list[Slot]) -> MemoryReport:
    """The report of these parameters; it describes their layout, allocated or not."""
    return MemoryReport(
        tuple(
            MemoryRow(
                name=slot.name,
                bits=slot.layout.bits,
                where=slot.layout.where,
                nbytes=slot.layout.nbytes,
                global_nbytes=slot.layout.global_nbytes,
                reason="; ".join(filter(None, (slot.layout.reason, slot.layout.unpaged))),
            )
            for slot in slots
            if slot.parameter.requires_grad
        )
    )
