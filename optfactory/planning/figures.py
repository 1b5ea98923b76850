"""The figures of a plan: groups, bytes, alternatives, and whether they fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from optfactory.config.schema import OptimizerConfig
from optfactory.memory import placement
from optfactory.planning.copies import Copies
from optfactory.planning.sizes import OF_OPTIMIZERS, STATE, Share
from optfactory.step.report import MemoryReport


@dataclass(frozen=True)
class PlannedGroup:
    """One param group.

    Attributes:
        name: the labels of the rules that match, or its number.
        parameters: their names.
        elements: how many elements they have together.
        overrides: hyperparameters that differ from the optimizer's.
        reasons: why each parameter is no hidden matrix, where that matters; else empty.
    """

    name: str
    parameters: tuple[str, ...]
    elements: int
    overrides: Mapping[str, Any]
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Alternative:
    """The same training under another name, with the same hyperparameters and rules.

    Attributes:
        name: of the optimizer.
        ranks: bytes of its state and scratch memory, for each of the plan's `ranks`.
        problem: why the config cannot have this name; else empty.
    """

    name: str
    ranks: tuple[tuple[Share, ...], ...]
    problem: str = ""

    @property
    def shares(self) -> tuple[Share, ...]:
        """Bytes of its state and scratch memory, on the rank that has the most of it."""
        return max(self.ranks, key=total, default=())

    @property
    def state_bytes(self) -> int:
        """Bytes of all state, on the rank that has the most of it."""
        return total(share for share in self.shares if share.what == STATE)


@dataclass(frozen=True)
class RankFigures:
    """What training needs on one rank, and on others that hold equally much.

    Attributes:
        ranks: their numbers.
        report: bits, bytes and place of every parameter's state, as `memory_report()` gives it.
        shares: bytes of parameters, buffers, gradients, state and scratch memory. Activations
            come on top.
    """

    ranks: tuple[int, ...]
    report: MemoryReport
    shares: tuple[Share, ...]

    @property
    def nbytes(self) -> int:
        """All bytes."""
        return total(self.shares)

    @property
    def state_bytes(self) -> int:
        """Bytes of all state."""
        return total(share for share in self.shares if share.what == STATE)


@dataclass(frozen=True)
class PlanFigures:
    """What training a model with an optimizer will need.

    On a mesh, what is said of one rank is said of the one that needs the most.

    Attributes:
        config: the optimizer's.
        groups: the param groups, as the optimizer will have them.
        unmatched: rules that match nothing, for which `build_optimizer` refuses, and the message.
        idle: other rules that change nothing here, and why.
        ranks: the figures of all ranks, the largest first; of this process alone without a mesh.
        copies: what of the largest rank's parameters and state other ranks hold, too.
        alternatives: what every name would take.
        mesh: the number of ranks along each dimension; empty without a mesh.
        shard: how tensors are cut on it.
        memory: bytes that there are on the device of a rank, if the caller said so.
    """

    config: OptimizerConfig
    groups: tuple[PlannedGroup, ...]
    unmatched: Mapping[str, str]
    idle: Mapping[str, str]
    ranks: tuple[RankFigures, ...]
    copies: tuple[Copies, ...]
    alternatives: tuple[Alternative, ...]
    mesh: tuple[int, ...] = ()
    shard: str = ""
    memory: int | None = None

    def on_rank(self, rank: int) -> RankFigures:
        """The figures of one rank of the mesh, whose ranks count row by row.

        Raises:
            ValueError: there is no such rank.
        """
        for figures in self.ranks:
            if rank in figures.ranks:
                return figures
        count = sum(len(figures.ranks) for figures in self.ranks)
        raise ValueError(f"ranks are 0 to {count - 1}, got {rank!r}")

    @property
    def report(self) -> MemoryReport:
        """Bits, bytes and place of every parameter's state, as `memory_report()` gives it."""
        return self.ranks[0].report

    @property
    def shares(self) -> tuple[Share, ...]:
        """Bytes of parameters, buffers, gradients and state. Activations come on top."""
        return self.ranks[0].shares

    @property
    def state_bytes(self) -> int:
        """Bytes of all state."""
        return self.ranks[0].state_bytes

    def needed(self, other: Alternative | tuple[Share, ...] | None = None) -> tuple[int, int]:
        """Bytes on the parameters' device: those that must stay, and those that can leave.

        On a mesh, as many as each rank's device needs: the most that must stay on one, and what is
        missing from there to the most that one has.

        Args:
            other: another name's state, in place of this one's.
        """
        if other is None:
            states = [figures.shares for figures in self.ranks]
        elif isinstance(other, Alternative):
            states = list(other.ranks)
        else:
            states = [other]
        needs = [
            self._needed(figures.shares, state)
            for figures, state in zip(self.ranks, states, strict=False)
        ]
        stay = max(stay for stay, _ in needs)
        return stay, max(stay + leave for stay, leave in needs) - stay

    def _needed(self, shares: tuple[Share, ...], state: tuple[Share, ...]) -> tuple[int, int]:
        device = shares[0].device if shares else "cpu"
        all_shares = [s for s in shares if s.what not in OF_OPTIMIZERS]
        all_shares += [s for s in state if s.what in OF_OPTIMIZERS]
        here = [s for s in all_shares if s.device == device]
        stay = total(s for s in here if s.place == placement.RESIDENT)
        return stay, total(here) - stay

    def verdict(self, other: Alternative | tuple[Share, ...] | None = None) -> str:
        """Whether it fits: ``fits``, ``fits paged`` (some state will be elsewhere) or ``no``.

        On a mesh, whether it does on every rank.
        """
        if self.memory is None:
            return ""
        stay, leave = self.needed(other)
        if stay + leave <= self.memory:
            return "fits"
        return "fits paged" if stay <= self.memory else "no"

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON has it."""
        stay, leave = self.needed()
        return {
            "config": self.config.model_dump(mode="json"),
            "groups": [asdict(group) for group in self.groups],
            "unmatched": dict(self.unmatched),
            "idle": dict(self.idle),
            "shares": [asdict(share) for share in self.shares],
            "state_bytes": self.state_bytes,
            "bytes_that_stay": stay,
            "bytes_that_can_leave": leave,
            "parameters": [asdict(row) for row in self.report.rows],
            "alternatives": [
                {
                    "name": other.name,
                    "state_bytes": None if other.problem else other.state_bytes,
                    "verdict": "" if other.problem else self.verdict(other),
                    "problem": other.problem,
                }
                for other in self.alternatives
            ],
            "sharding": self._sharding(),
            "memory": self.memory,
            "verdict": self.verdict(),
        }

    def _sharding(self) -> dict[str, Any] | None:
        if not self.mesh:
            return None
        return {
            "mesh": list(self.mesh),
            "shard": self.shard,
            "ranks": [
                {
                    "first": figures.ranks[0],
                    "count": len(figures.ranks),
                    "bytes": figures.nbytes,
                    "state_bytes": figures.state_bytes,
                }
                for figures in self.ranks
            ],
            "copies": [asdict(kind) for kind in self.copies],
        }


def total(shares: Iterable[Share]) -> int:
    """Their bytes together."""
    return sum(share.nbytes for share in shares)
