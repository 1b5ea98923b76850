"""What an optimizer's state costs, and where it lives."""

from __future__ import annotations

from dataclasses import dataclass

from optfactory.step.slots import Slot


@dataclass(frozen=True)
class MemoryRow:
    """The state of one parameter.

    Attributes:
        name: the parameter's name.
        bits: 8 or 32.
        where: ``resident``, ``file-mapped``, ``managed`` or ``pinned``.
        nbytes: bytes of its state tensors, scales and step included.
        reason: why it is 32-bit although optim_bits is 8, or not paged although is_paged is true;
            else empty.
    """

    name: str
    bits: int
    where: str
    nbytes: int
    reason: str


@dataclass(frozen=True)
class MemoryReport:
    """The state of all trainable parameters, one row each."""

    rows: tuple[MemoryRow, ...]

    @property
    def state_bytes(self) -> int:
        """Bytes of all state tensors."""
        return sum(row.nbytes for row in self.rows)

    def __str__(self) -> str:
        width = max(map(len, ("parameter", *(row.name for row in self.rows))))
        lines = [f"{'parameter':{width}} {'bits':>4} {'bytes':>14}  place"]
        for row in self.rows:
            note = f" ({row.reason})" if row.reason else ""
            lines.append(f"{row.name:{width}} {row.bits:>4} {row.nbytes:>14,}  {row.where}{note}")
        lines.append(f"{'total':{width}} {'':>4} {self.state_bytes:>14,}")
        return "\n".join(lines)


def report(slots: list[Slot]) -> MemoryReport:
    """The report of these parameters; it describes their layout, allocated or not."""
    return MemoryReport(
        tuple(
            MemoryRow(
                name=slot.name,
                bits=8 if slot.layout.quantized else 32,
                where=slot.layout.where,
                nbytes=slot.layout.nbytes,
                reason="; ".join(filter(None, (slot.layout.reason, slot.layout.unpaged))),
            )
            for slot in slots
            if slot.parameter.requires_grad
        )
    )
