"""The figures of a plan: groups, bytes, alternatives, and whether they fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from optfactory.config.schema import OptimizerConfig
from optfactory.memory import placement
from optfactory.planning.sizes import STATE, Share
from optfactory.step.report import MemoryReport


@dataclass(frozen=True)
class PlannedGroup:
    """One param group.

    Attributes:
        name: the labels of the rules that match, or its number.
        parameters: their names.
        elements: how many elements they have together.
        overrides: hyperparameters that differ from the optimizer's.
    """

    name: str
    parameters: tuple[str, ...]
    elements: int
    overrides: Mapping[str, Any]


@dataclass(frozen=True)
class Alternative:
    """The same training under another name, with the same hyperparameters and rules.

    Attributes:
        name: of the optimizer.
        shares: bytes of its state.
        problem: why the config cannot have this name; else empty.
    """

    name: str
    shares: tuple[Share, ...]
    problem: str = ""

    @property
    def state_bytes(self) -> int:
        """Bytes of all state."""
        return sum(share.nbytes for share in self.shares)


@dataclass(frozen=True)
class PlanFigures:
    """What training a model with an optimizer will need.

    Attributes:
        config: the optimizer's.
        groups: the param groups, as the optimizer will have them.
        unmatched: rules that match nothing, for which `build_optimizer` refuses, and the message.
        idle: other rules that change nothing here, and why.
        report: bits, bytes and place of every parameter's state, as `memory_report()` gives it.
        shares: bytes of parameters, buffers, gradients and state. Activations come on top.
        alternatives: what every name would take.
        memory: bytes that there are on the device, if the caller said so.
    """

    config: OptimizerConfig
    groups: tuple[PlannedGroup, ...]
    unmatched: Mapping[str, str]
    idle: Mapping[str, str]
    report: MemoryReport
    shares: tuple[Share, ...]
    alternatives: tuple[Alternative, ...]
    memory: int | None = None

    @property
    def state_bytes(self) -> int:
        """Bytes of all state."""
        return sum(share.nbytes for share in self.shares if share.what == STATE)

    def needed(self, shares: tuple[Share, ...] | None = None) -> tuple[int, int]:
        """Bytes on the parameters' device: those that must stay, and those that can leave.

        Args:
            shares: of another name's state, in place of this one's.
        """
        device = self.shares[0].device if self.shares else "cpu"
        state = self.shares if shares is None else shares
        all_shares = [s for s in self.shares if s.what != STATE]
        all_shares += [s for s in state if s.what == STATE]
        here = [s for s in all_shares if s.device == device]
        stay = sum(s.nbytes for s in here if s.place == placement.RESIDENT)
        return stay, sum(s.nbytes for s in here) - stay

    def verdict(self, shares: tuple[Share, ...] | None = None) -> str:
        """Whether it fits: ``fits``, ``fits paged`` (some state will be elsewhere) or ``no``."""
        if self.memory is None:
            return ""
        stay, leave = self.needed(shares)
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
                    "verdict": "" if other.problem else self.verdict(other.shares),
                    "problem": other.problem,
                }
                for other in self.alternatives
            ],
            "memory": self.memory,
            "verdict": self.verdict(),
        }
