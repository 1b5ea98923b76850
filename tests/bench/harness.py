"""Figures made by hand, tiny cases, and a device whose clock is a script."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from optfactory.bench.candidates import Candidate
from optfactory.bench.cases import Case
from optfactory.bench.device import CallFigures, CpuDevice
from optfactory.bench.results import FORMAT, Absent, Figures, Memory, Row, Startup

LINE = Case("line", "one line", ((1000,),))
ROW = Row(
    case="large",
    text="one tensor of 33.5 M elements",
    dtype="float32",
    optimizer="torch AdamW fused",
    library="torch",
    tensors=1,
    elements=1_000_000,
    pairs=9,
    ms=0.7,
    ns_per_param=0.7,
    best_ms=0.69,
    fused_ms=0.7,
    best_fused_ms=0.69,
    times_limit=1.0,
    times_fused=1.0,
    best_times_fused=1.0,
    state_bytes_per_param=8.0,
    moved_bytes_per_param=28.0,
)


def row(optimizer: str, library: str = "optfactory", **values: Any) -> Row:
    return replace(ROW, optimizer=optimizer, library=library, **values)


def make_figures(*rows: Row, **values: Any) -> Figures:
    machine: dict[str, str | int] = {"device": "Abacus 2", "threads": 2, "torch": "2.13.0"}
    return Figures("0.1.0", machine, 40e9, "a = a*s + b", rows=list(rows), **values)


def every_kind() -> Figures:
    """Figures with something in every list."""
    return make_figures(
        ROW,
        row("adamw8bit", times_limit=1.75, state_bytes_per_param=2.03125),
        row("torchao AdamW8bit", "torchao", ms=23.0, ns_per_param=23.0, times_fused=32.86),
        row("lamb", case="small", text="1000 tensors of 64", times_fused=1.5),
        absent=[
            Absent("timm Lamb", "not installed"),
            Absent("torchao AdamW4bit", "RuntimeError: no", "small", "float32"),
        ],
        memory=[Memory("large", "float32", "adamw8bit", 1.25, 0.03)],
        startup=[Startup("adamw8bit", "cold", 0.25, 0.01, 1.5, 0.02)],
    )


def momentum(label: str = "momentum", passes: int = 1, library: str = "test") -> Candidate:
    """SGD with momentum: one state, of exactly the parameter's size."""

    def build(parameters: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=1e-4, momentum=0.9)

    return Candidate(label, library, build, passes)


def failing(error: Exception, library: str = "test") -> Candidate:
    def build(parameters: list[Tensor]) -> torch.optim.Optimizer:
        raise error

    return Candidate("failing", library, build)


class ScriptedDevice(CpuDevice):
    """Says that calls take the given times, one after the other."""

    def __init__(self, times: Iterable[float] = (), room: float = 1e12) -> None:
        self._times, self._room = iter(times), room

    def time(self, call: Callable[[], object]) -> float:
        call()
        return next(self._times, 1.0)

    def get_ready(self, *calls: Callable[[], object]) -> list[CallFigures]:
        return [CallFigures(float(i), 10.0 * i) for i, _ in enumerate(calls)]

    def room(self) -> float:
        return self._room

    def release(self) -> None:
        """Nothing here is worth a full garbage collection."""


def no_tick(*progress: object) -> None:
    """Nobody watches."""


# ---- the JSON --------------------------------------------------------------------------------

NUMBER = (int, float)
ROW_FIELDS = {
    **dict.fromkeys(("case", "text", "dtype", "optimizer", "library"), str),
    **dict.fromkeys(("tensors", "elements", "pairs"), int),
    **dict.fromkeys(("ms", "ns_per_param", "best_ms", "fused_ms", "best_fused_ms"), NUMBER),
    **dict.fromkeys(("times_limit", "times_fused", "best_times_fused"), NUMBER),
    **dict.fromkeys(("state_bytes_per_param", "moved_bytes_per_param"), NUMBER),
    **dict.fromkeys(("host_ms", "extra_mib"), (*NUMBER, type(None))),
    "unsteady": bool,
}
SCHEMA = {
    "rows": ROW_FIELDS,
    "absent": dict.fromkeys(("optimizer", "reason", "case", "dtype"), str),
    "memory": {
        **dict.fromkeys(("case", "dtype", "optimizer"), str),
        **dict.fromkeys(("extra_mib", "transient_mib"), NUMBER),
    },
    "startup": {
        **dict.fromkeys(("optimizer", "cache"), str),
        **dict.fromkeys(("imported", "built", "first", "later"), NUMBER),
    },
}


def assert_has_the_schema(values: dict[str, Any]) -> None:
    """Of the command's JSON, parsed."""
    rest = {"format", "optfactory", "machine", "bandwidth", "probe"}
    assert values.keys() == rest | SCHEMA.keys()
    assert values["format"] == FORMAT
    assert isinstance(values["optfactory"], str)
    assert values["machine"]["device"]
    assert all(isinstance(value, str | int) for value in values["machine"].values())
    assert values["bandwidth"] > 0
    for key, fields in SCHEMA.items():
        for item in values[key]:
            assert item.keys() == fields.keys()
            assert all(isinstance(item[name], kind) for name, kind in fields.items())
