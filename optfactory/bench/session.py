"""A run: all parts, cases, dtypes and candidates that the settings name."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from optfactory import __version__
from optfactory.bench import candidates as known
from optfactory.bench import traffic
from optfactory.bench.arguments import DEFAULTS, Settings
from optfactory.bench.candidates import BASELINE, FOREACH, Candidate
from optfactory.bench.cases import CASES, fitting
from optfactory.bench.device import DEVICES, Device
from optfactory.bench.isolated import peak_memory, startup
from optfactory.bench.machine import versions
from optfactory.bench.measure import CaseRun
from optfactory.bench.results import Absent, Figures
from optfactory.bench.show import progress


def measure(settings: Settings, report: Callable[[Figures], None]) -> Figures:
    """Measure all that the settings ask for.

    Args:
        report: called whenever there is more to see; a run may be cut short.

    Raises:
        UnknownOptimizerError: nothing of such a name; nothing was measured.
        BackendError: there is no such device.
    """
    ours = known.chosen(settings.names or DEFAULTS[settings.device].names)
    with _threads(settings.threads):
        device = DEVICES[settings.device]()
        figures = Figures(
            optfactory=__version__,
            machine=device.describe(),
            bandwidth=device.bandwidth(settings.quick),
            probe=traffic.PROBE,
        )
        device.release()
        if "time" in settings.parts:
            _measure_times(settings, device, ours, figures, report)
        if "memory" in settings.parts:
            _measure_memory(settings, ours, figures)
            report(figures)
        if "startup" in settings.parts:
            _measure_startup(settings, ours, figures)
            report(figures)
    return figures


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _measure_times(
    settings: Settings,
    device: Device,
    ours: Sequence[Candidate],
    figures: Figures,
    report: Callable[[Figures], None],
) -> None:
    """Step times of every case and dtype."""
    asked_for = {c.label for c in known.chosen([n for n in settings.names if not known.is_glob(n)])}
    candidates = [FOREACH, *(replace(c, cases=()) if c.label in asked_for else c for c in ours)]
    if settings.peers:
        there, absent = known.peers(settings.device, [c.label for c in ours])
        candidates += there
        figures.absent += absent
        figures.machine |= versions(*(peer.library for peer in there))
    for name, dtype in itertools.product(settings.cases, settings.dtypes):
        case = fitting(CASES[name], dtype, device.room())
        if not case.shapes:
            figures.absent.append(Absent("all", "no room for a tensor of this case", name, dtype))
            continue
        asked = [candidate for candidate in candidates if candidate.is_for(name)]
        with progress(f"{name} {dtype}", len(asked)) as tick:
            run = CaseRun(
                *(case, dtype, device, figures.bandwidth),
                *(settings.seconds, settings.least_pairs),
            )
            rows, absent = run.run(asked, tick)
        figures.rows += rows
        figures.absent += absent
        del run
        device.release()
        # Again: what else runs on the machine may have slowed the first streams down.
        figures.raise_bandwidth(device.bandwidth(settings.quick), device.caches())
        report(figures)


def _measure_memory(settings: Settings, ours: Sequence[Candidate], figures: Figures) -> None:
    """Peak memory of every case and dtype."""
    labels = [BASELINE.label, *(candidate.label for candidate in ours)]
    asked = list(itertools.product(settings.cases, settings.dtypes, labels))
    with progress("peak memory", len(asked)) as tick:
        for case, dtype, label in asked:
            tick(f"{case} {dtype} {label}", 0.0)
            figures.memory.append(peak_memory(label, case, dtype, torch.get_num_threads()))


def _measure_startup(settings: Settings, ours: Sequence[Candidate], figures: Figures) -> None:
    """Cost of the first step, of few where the command line names none."""
    labels = [candidate.label for candidate in ours]
    if not settings.names:
        labels = list(DEFAULTS[settings.device].startup)
    with progress("first step", len(labels)) as tick:
        for label in labels:
            tick(label, 0.0)
            figures.startup += startup(label, settings.device, torch.get_num_threads())
