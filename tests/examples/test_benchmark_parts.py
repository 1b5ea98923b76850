"""The benchmark's arguments, cases and arithmetic, also those for GPUs, without a GPU."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from optfactory import list_optimizers

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def examples_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))


# ---- arguments --------------------------------------------------------------------------------


def test_what_is_measured_on_cpus_where_nothing_is_said() -> None:
    import benchmark

    args = benchmark.parse([])
    assert args.device == "cpu"
    assert list(args.cases) == ["large", "gpt2", "small"]
    assert list(args.dtype) == ["float32"]
    assert list(args.parts) == ["time", "memory", "startup"]
    assert (args.seconds, args.repeats) == (8.0, 5)
    ours = ["adamw", "adamw8bit", "adam8bit", "lamb", "lamb8bit"]
    assert benchmark.candidates(args) == ["torch_fused", "torch_foreach", *ours]
    assert list(args.startup_names) == ours
    with_peers = benchmark.candidates(benchmark.parse(["--peers"]))
    assert with_peers[-2:] == ["bnb_adamw", "bnb_adamw8bit"]


def test_what_is_measured_on_gpus_where_nothing_is_said() -> None:
    import benchmark

    args = benchmark.parse(["--device", "cuda"])
    assert list(args.dtype) == ["float32", "bfloat16"]
    assert {"1m", "100m", "1b", "llama7b", "small2000"} == set(args.cases)
    every = benchmark.candidates(args)
    assert every[0] == "torch_fused"
    assert {"adam", "adamw", "lamb", "adam8bit", "adamw8bit", "lamb8bit"} <= set(every)
    ours = [name.partition(":")[0] for name in args.names]
    assert set(ours) <= set(list_optimizers())
    without = benchmark.candidates(benchmark.parse(["--device", "cuda", "--no-peers"]))
    assert without == ["torch_fused", *args.names]


def test_what_is_said_is_measured() -> None:
    import benchmark

    line = "--device cuda --names lamb8bit --cases 1m --dtype float16 --seconds 0.5 --parts time"
    args = benchmark.parse(line.split())
    assert args.names == args.startup_names == ["lamb8bit"]
    assert (args.cases, args.dtype, args.seconds) == (["1m"], ["float16"], 0.5)
    assert benchmark.parse(["--device", "cuda", "--quick"]).cases == ["tiny"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_there_is_a_message() -> None:
    from bench.device import CudaDevice

    with pytest.raises(SystemExit, match="no CUDA device"):
        CudaDevice()


# ---- cases ------------------------------------------------------------------------------------


def elements(case: str) -> int:
    from bench import cases

    return sum(math.prod(shape) for shape in cases.CASES[case][1])


def test_cases_have_the_sizes_they_claim() -> None:
    from bench import cases

    assert elements("gpt2") == 124_439_808
    assert elements("llama7b") == 6_738_415_616
    assert len(cases.CASES["llama7b"][1]) == 291
    assert len(cases.CASES["small2000"][1]) == 2000
    for case, size in (("1m", 1e6), ("100m", 1e8), ("1b", 1e9)):
        assert elements(case) == pytest.approx(size, rel=0.05)


def test_a_case_is_cut_to_what_fits() -> None:
    from bench import cases

    whole = cases.CASES["llama7b"][1]
    assert cases.fitting("llama7b", "float32", math.inf) == whole
    need = 24 * elements("llama7b")  # 4 bytes of p, g and torch's two states, 8 of the candidate's
    assert cases.fitting("llama7b", "float32", need) == whole
    part = cases.fitting("llama7b", "float32", need / 2)
    assert part == whole[: len(part)]
    assert 0.45 < sum(map(math.prod, part)) / elements("llama7b") <= 0.5
    assert len(cases.fitting("llama7b", "bfloat16", need / 2)) > len(part)
    assert cases.fitting("1b", "float32", 1e9) == []


def test_paged_optimizers_and_slow_compilers_are_measured_on_one_tensor_only() -> None:
    from bench import cases

    for name in ("paged_adamw8bit:pinned", "bnb_paged_adamw8bit", "ao_adamw8bit"):
        assert [case for case in cases.CASES if cases.is_for(name, case)] == ["100m", "tiny"]
    assert all(cases.is_for("lamb8bit", case) for case in cases.CASES)


# ---- limits -----------------------------------------------------------------------------------

# Read p, g and both states, write p and both states; LAMB reads p, g and the states once more.
BYTES = {
    ("adamw", "float32", 8.0): 28.0,
    ("adamw8bit", "float32", 2 + 8 / 256): 16.0625,
    ("adamw", "bfloat16", 8.0): 22.0,
    ("adamw8bit", "bfloat16", 2 + 8 / 256): 10.0625,
    ("torch_fused", "bfloat16", 4.0): 14.0,
    ("lamb", "float32", 8.0): 44.0,
    ("lamb8bit", "float32", 2 + 8 / 256): 26.09375,
    ("lamb", "bfloat16", 8.0): 34.0,
    ("lamb8bit", "bfloat16", 2 + 8 / 256): 16.09375,
}


@pytest.mark.parametrize(("name", "dtype", "states"), BYTES)
def test_bytes_that_a_step_must_move(name: str, dtype: str, states: float) -> None:
    from bench import cases

    shapes = cases.CASES["1b"][1]
    parameters = [torch.empty(s, dtype=cases.DTYPES[dtype], device="meta") for s in shapes]
    count = cases.count(parameters)
    least = cases.least_bytes(name, parameters, int(states * count))
    assert least / count == pytest.approx(BYTES[name, dtype, states], rel=1e-6)


def test_bytes_of_states_that_wrap_others_are_counted() -> None:
    from bench import cases

    inner = torch.zeros(100, dtype=torch.uint8), torch.zeros(4)

    class Wrapper(Tensor):
        def __tensor_flatten__(self) -> tuple[list[str], None]:
            return ["codes", "scale"], None

    wrapper = torch.zeros(100).as_subclass(Wrapper)
    wrapper.codes, wrapper.scale = inner  # type: ignore[attr-defined]
    assert list(cases.stored(wrapper)) == list(inner)
    plain = torch.zeros(3)
    assert list(cases.stored(plain)) == [plain]


# ---- runs -------------------------------------------------------------------------------------


def on_the_host(bytes_free: float = 1e12) -> Any:
    """The GPU's part of the benchmark with another clock, on CPU tensors."""
    from bench.device import CpuDevice, CudaDevice

    class OnTheHost(CudaDevice):
        name = "cpu"
        time = CpuDevice.time
        release = CpuDevice.release

        def __init__(self) -> None:
            pass

        def get_ready(self, *calls: Any) -> dict[str, float]:
            return {"host_ms": 1.0, "extra_mib": 0.0}

        def room(self) -> float:
            return bytes_free

    return OnTheHost()


def test_every_case_and_dtype_has_its_rows(capsys: pytest.CaptureFixture[str]) -> None:
    import benchmark

    names = ["torch_fused", "adamw8bit", "paged_lamb8bit"]
    args = benchmark.parse(["--device", "cuda", "--quick"])
    tables = benchmark.run_times(names, on_the_host(), 1e9, args)
    rows = [row for table in tables for row in table]
    expected = [(dtype, name) for dtype in ("float32", "bfloat16") for name in names]
    assert [(row["dtype"], row["name"]) for row in rows] == expected
    for row in rows:
        assert row["host_ms"] == 1.0
        assert row["ms"] > 0
        assert row["times_limit"] == pytest.approx(
            1e-3 * row["ms"] * 1e9 / (row["bytes_per_param"] * row["elements"])
        )
    output = capsys.readouterr().out
    assert output.count("tiny: ") == 2
    for heading in ("x limit", "x fused", "B/param moved", "host ms", "MiB in step"):
        assert heading in output


def test_what_is_asked_for_by_name_is_measured_in_every_case(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import benchmark
    from bench import cases

    small = {"1m": ("small", [(8, 64)]), "tiny": ("tiny", [(8, 64)])}
    monkeypatch.setattr(cases, "CASES", small)
    name, line = "paged_adamw8bit", ["--device", "cuda", "--dtype", "float32", "--seconds", "0"]
    asked = benchmark.parse([*line, "--cases", "1m", "tiny", "--names", name])
    unasked = benchmark.parse([*line, "--cases", "1m", "tiny"])
    for args, wanted in ((asked, ["1m", "tiny"]), (unasked, ["tiny"])):
        tables = benchmark.run_times(["adamw", name], on_the_host(), 1e9, args)
        assert [r["case"] for rows in tables for r in rows if r["name"] == name] == wanted


def test_what_does_not_fit_is_cut_or_left_out_with_a_note(
    capsys: pytest.CaptureFixture[str],
) -> None:
    import benchmark

    args = benchmark.parse(["--device", "cuda", "--quick", "--dtype", "float32"])
    room = 24 * (10 * 64 + 2 * 128 * 256)
    ((row,),) = benchmark.run_times(["adamw"], on_the_host(room), 1e9, args)
    assert row["elements"] == 10 * 64 + 2 * 128 * 256
    assert "of which the first 12 of 14 tensors fit" in capsys.readouterr().out
    assert list(benchmark.run_times(["adamw"], on_the_host(10), 1e9, args)) == []
    assert "left out" in capsys.readouterr().out


def test_a_peer_that_fails_leaves_the_others_figures(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import benchmark
    from bench import cases

    monkeypatch.setitem(cases.PEERS, "bnb_adamw", ("bitsandbytes_that_is_not_there", "AdamW"))
    args = benchmark.parse(["--device", "cuda", "--quick", "--dtype", "float32"])
    (rows,) = benchmark.run_times(["bnb_adamw", "adamw"], on_the_host(), 1e9, args)
    assert [row["name"] for row in rows] == ["adamw"]
    assert "bnb_adamw: no figures, ModuleNotFoundError" in capsys.readouterr().out
