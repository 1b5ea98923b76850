"""Alternated steps, and the arithmetic of a row against sums by hand."""

from __future__ import annotations

import pytest
import torch

from optfactory.bench import measure
from optfactory.bench.candidates import BASELINE, OURS
from optfactory.bench.measure import CaseRun, alternate
from optfactory.bench.results import MOST_ROUNDS, Absent, Row
from tests.bench.harness import LINE, ScriptedDevice, failing, momentum, no_tick


def run_of(times=(), bandwidth=1e9, seconds=0.0, least=3) -> CaseRun:
    return CaseRun(LINE, "float32", ScriptedDevice(times), bandwidth, seconds, least)


# ---- alternation ------------------------------------------------------------------------------


def test_calls_alternate_step_by_step():
    calls: list[str] = []
    both = (lambda: calls.append("torch"), lambda: calls.append("ours"))
    times = alternate(ScriptedDevice([1.0, 2.0, 3.0, 4.0]), both, 0.0, 2, no_tick)
    assert calls == ["torch", "ours"] * 2
    assert times == [(1.0, 2.0), (3.0, 4.0)]


@pytest.mark.parametrize(
    ("second_per_call", "seconds", "least", "expected"),
    [
        (1.0, 10.0, 2, 5),
        (1.0, 3.0, 4, 4),  # least, however long it takes
        (1e-6, 1e9, 1, measure.MOST_PAIRS),
    ],
)
def test_the_time_given_is_used_up(monkeypatch, second_per_call, seconds, least, expected):
    now = 0.0

    def work() -> None:
        nonlocal now
        now += second_per_call

    monkeypatch.setattr(measure.time, "monotonic", lambda: now)
    done: list[float] = []
    pairs = alternate(ScriptedDevice(), (work, work), seconds, least, done.append)
    assert len(pairs) == len(done) == expected
    assert done == sorted(done)
    assert 0 < done[0] <= done[-1] <= 1


def test_a_cases_time_is_shared_by_its_candidates(monkeypatch):
    given: list[float] = []

    def alternated(device, calls, seconds, least, tick):
        given.append(seconds)
        return [(1.0, 1.0)] * least

    monkeypatch.setattr(measure, "alternate", alternated)
    run_of(seconds=12.0).run([momentum("a"), momentum("b"), momentum("c")], no_tick)
    assert given == [4.0, 4.0, 4.0]


def test_candidates_are_announced_and_watched():
    seen: list[tuple[str, float]] = []
    run_of(least=2).run([momentum("a"), momentum("b")], lambda *x: seen.append(x))
    assert seen == [(label, done) for label in "ab" for done in (0.0, 0.5, 1.0)]


def _rounds(monkeypatch: pytest.MonkeyPatch, *rounds: list[tuple[float, float]]) -> Row:
    """The row of one candidate whose pairs come in these rounds."""
    script = iter(rounds)
    monkeypatch.setattr(measure, "alternate", lambda *_: next(script))
    rows, _ = run_of(seconds=1.0).run([momentum()], no_tick)
    assert next(script, None) is None
    return rows[1]


STEADY = [(1.0, 2.0)] * 9
NOISY = [(1.0, 2.0), (2.0, 2.0), (3.0, 9.0), (2.0, 1.0)] * 3


def test_a_steady_ratio_is_measured_once_however_busy_the_machine(monkeypatch):
    row = _rounds(monkeypatch, [(x, 2 * x) for x in (1.0, 2.0, 3.0, 4.0)])
    assert (row.pairs, row.times_fused, row.unsteady) == (4, 2.0, False)


def test_what_varies_is_measured_until_it_is_steady(monkeypatch):
    row = _rounds(monkeypatch, NOISY, STEADY * 9)
    assert (row.pairs, row.times_fused, row.unsteady) == (93, 2.0, False)


def test_what_stays_unsteady_says_so(monkeypatch):
    row = _rounds(monkeypatch, *[NOISY] * MOST_ROUNDS)
    assert (row.pairs, row.unsteady) == (60, True)


# ---- rows -------------------------------------------------------------------------------------


def test_the_arithmetic_of_a_row():
    # fused 1, 2, 9 ms; the candidate 4, 2, 3 ms
    times = [0.001, 0.004, 0.002, 0.002, 0.009, 0.003]
    rows, absent = run_of(times, bandwidth=1e9).run([momentum(library="other")], no_tick)
    assert absent == []
    row = rows[1]
    assert (row.case, row.text, row.dtype) == ("line", "one line", "float32")
    assert (row.optimizer, row.library) == ("momentum", "other")
    assert (row.tensors, row.elements, row.pairs) == (1, 1000, 3)
    assert row.ms == pytest.approx(3.0)
    assert row.ns_per_param == pytest.approx(3000.0)
    assert row.best_ms == pytest.approx(2.0)
    assert row.fused_ms == pytest.approx(2.0)
    assert row.best_fused_ms == pytest.approx(1.0)
    assert row.times_fused == pytest.approx(1.0)  # the median of 4/1, 2/2, 3/9
    assert row.best_times_fused == pytest.approx(2.0)
    assert row.state_bytes_per_param == 4.0
    # 20 bytes an element at 1 GB/s: 20 ns a parameter
    assert row.times_limit == pytest.approx(150.0)
    assert row.limit == pytest.approx(20.0)
    assert (row.host_ms, row.extra_mib) == (1.0, 10.0)


def test_the_baselines_row_holds_its_steps_beside_all_candidates():
    times = [0.001, 1.0, 0.002, 1.0, 0.004, 1.0, 0.008, 1.0]
    rows, _ = run_of(times, least=2).run([momentum("a"), momentum("b")], no_tick)
    assert [row.optimizer for row in rows] == [BASELINE.label, "a", "b"]
    fused = rows[0]
    assert fused.pairs == 4
    assert fused.ms == fused.fused_ms == pytest.approx(3.0)
    assert fused.best_ms == fused.best_fused_ms == pytest.approx(1.0)
    assert fused.times_fused == fused.best_times_fused == 1.0
    assert (fused.host_ms, fused.extra_mib) == (0.0, 0.0)
    assert rows[2].fused_ms == pytest.approx(6.0)


def test_all_candidates_step_the_same_tensors_and_states_exist_before_the_clock_starts():
    stepped: list[object] = []

    class Watching(ScriptedDevice):
        def get_ready(self, *calls):
            stepped.extend(
                (call.__self__.param_groups[0]["params"][0], bool(call.__self__.state))
                for call in calls
            )
            return super().get_ready(*calls)

    run = CaseRun(LINE, "bfloat16", Watching(), 1e9, 0.0, 1)
    run.run([momentum("a"), momentum("b")], no_tick)
    assert len(stepped) == 4
    assert all(parameter is stepped[0][0] for parameter, _ in stepped)
    assert all(has_state for _, has_state in stepped)


# ---- failures ---------------------------------------------------------------------------------


def test_a_peer_that_fails_leaves_the_others_figures():
    broken = failing(ModuleNotFoundError("no such\nlong story"))
    rows, absent = run_of().run([broken, momentum()], no_tick)
    assert [row.optimizer for row in rows] == [BASELINE.label, "momentum"]
    assert absent == [Absent("failing", "ModuleNotFoundError: no such", "line", "float32")]


def test_one_of_ours_may_lack_memory_but_not_fail_otherwise():
    rows, absent = run_of().run([failing(torch.OutOfMemoryError("full"), OURS)], no_tick)
    assert rows == []
    assert absent[0].reason == "OutOfMemoryError: full"
    with pytest.raises(RuntimeError, match="a bug"):
        run_of().run([failing(RuntimeError("a bug"), OURS)], no_tick)
