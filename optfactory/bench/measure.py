"""Step times: candidates and torch fused on the same tensors, alternated step by step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from optfactory.bench import traffic
from optfactory.bench.candidates import BASELINE, OURS, Candidate, state_bytes
from optfactory.bench.cases import Case
from optfactory.bench.device import Call, CallFigures, Device
from optfactory.bench.results import MOST_ROUNDS, Absent, Row

MOST_PAIRS = 300
BUSY = 1.3  # median over fastest baseline step beyond which other load spoils the medians
_CLOSE = 1.1  # of a ratio's upper to its lower quartile, which other load hardly moves
# Called between steps with a candidate's label and how much of its time is used, 0 to 1.
Tick = Callable[[str, float], None]


def make_parameters(case: Case, dtype: str, device: str) -> list[Tensor]:
    """Parameters with gradients, the same ones every time."""
    generator = torch.Generator(device).manual_seed(0)
    parameters = []
    for shape in case.shapes:
        p, grad = (
            torch.empty(shape, dtype=getattr(torch, dtype), device=device).normal_(
                std=std, generator=generator
            )
            for std in (0.02, 0.01)
        )
        p.requires_grad_().grad = grad
        parameters.append(p)
    return parameters


def alternate(
    device: Device,
    calls: tuple[Call, Call],
    seconds: float,
    least: int,
    tick: Callable[[float], None],
) -> list[tuple[float, float]]:
    """Seconds of either call, alternated until the time is used up.

    Args:
        least: pairs that are measured however long they take.
        tick: called between pairs with how much of the time is used, 0 to 1.
    """
    begin = time.monotonic()
    pairs: list[tuple[float, float]] = []
    while len(pairs) < least or (time.monotonic() < begin + seconds and len(pairs) < MOST_PAIRS):
        pairs.append((device.time(calls[0]), device.time(calls[1])))
        done = (time.monotonic() - begin) / seconds if seconds else len(pairs) / least
        tick(min(done, 1.0))
    return pairs


def is_unsteady(pairs: Sequence[tuple[float, float]]) -> bool:
    """Whether other load hides the ratio of two calls whose seconds are pairs, baseline first."""
    beside = [pair[0] for pair in pairs]
    if statistics.median(beside) <= BUSY * min(beside):
        return False
    quartiles = statistics.quantiles([own / other for other, own in pairs], method="inclusive")
    return quartiles[2] > _CLOSE * quartiles[0]


@dataclass(frozen=True)
class _Steps:
    """Seconds of an optimizer's steps, and of the baseline's beside them."""

    own: list[float]
    fused: list[float]
    figures: CallFigures


class CaseRun:
    """One case and dtype: the parameters, the baseline, and one candidate at a time.

    Args:
        seconds: time for the steps of all candidates together.
        least: pairs of steps that are measured however long they take.
        bandwidth: bytes a second.
    """

    def __init__(
        self, case: Case, dtype: str, device: Device, bandwidth: float, seconds: float, least: int
    ) -> None:
        self._case, self._dtype, self._device = case, dtype, device
        self._bandwidth, self._seconds, self._least = bandwidth, seconds, least
        self._parameters = make_parameters(case, dtype, device.name)
        self._baseline = BASELINE.build(self._parameters)

    def run(self, candidates: Sequence[Candidate], tick: Tick) -> tuple[list[Row], list[Absent]]:
        """The rows of the baseline and of all candidates, and which have none."""
        rows: list[Row] = []
        absent: list[Absent] = []
        fused: list[float] = []
        figures = CallFigures()
        for candidate in candidates:
            try:
                row, beside = self._measure(candidate, self._seconds / len(candidates), tick)
            except Exception as error:  # a peer's failure must not end the run
                if candidate.library == OURS and not isinstance(error, torch.OutOfMemoryError):
                    raise
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                absent.append(Absent(candidate.label, reason, self._case.name, self._dtype))
            else:
                rows.append(row)
                fused += beside.own
                figures = beside.figures
            self._device.release()
        if fused:
            rows.insert(0, self._row(BASELINE, self._baseline, _Steps(fused, fused, figures)))
        return rows, absent

    def _measure(self, candidate: Candidate, seconds: float, tick: Tick) -> tuple[Row, _Steps]:
        """A candidate's row, and the baseline's steps beside it."""
        tick(candidate.label, 0.0)
        optimizer = candidate.build(self._parameters)
        calls = (self._baseline.step, optimizer.step)
        for call in calls * 2:  # the first step makes the states, and perhaps compiles
            call()
        beside, figures = self._device.get_ready(*calls)
        pairs: list[tuple[float, float]] = []
        for _ in range(MOST_ROUNDS if seconds else 1):
            pairs += alternate(
                self._device, calls, seconds, self._least, lambda done: tick(candidate.label, done)
            )
            if not is_unsteady(pairs):
                break
        fused, own = (list(times) for times in zip(*pairs, strict=True))
        row = self._row(candidate, optimizer, _Steps(own, fused, figures))
        return row, _Steps(fused, fused, beside)

    def _row(self, candidate: Candidate, optimizer: Optimizer, steps: _Steps) -> Row:
        elements = self._case.elements
        states = state_bytes(optimizer)
        size = sum(p.nbytes for p in self._parameters)  # of gradients too: they have the same dtype
        moved = traffic.step_bytes(
            *(size, size, states, candidate.passes), of_gradients=candidate.of_gradients
        )
        median = statistics.median(steps.own)
        ratios = (own / beside for own, beside in zip(steps.own, steps.fused, strict=True))
        return Row(
            case=self._case.name,
            text=self._case.text,
            dtype=self._dtype,
            optimizer=candidate.label,
            library=candidate.library,
            tensors=len(self._parameters),
            elements=elements,
            pairs=len(steps.own),
            ms=1e3 * median,
            ns_per_param=1e9 * median / elements,
            best_ms=1e3 * min(steps.own),
            fused_ms=1e3 * statistics.median(steps.fused),
            best_fused_ms=1e3 * min(steps.fused),
            times_limit=median / traffic.seconds_at(self._bandwidth, moved),
            times_fused=statistics.median(ratios),
            best_times_fused=min(steps.own) / min(steps.fused),
            unsteady=is_unsteady(list(zip(steps.fused, steps.own, strict=True))),
            state_bytes_per_param=states / elements,
            moved_bytes_per_param=moved / elements,
            host_ms=steps.figures.host_ms,
            extra_mib=steps.figures.extra_mib,
        )
