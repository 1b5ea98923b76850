"""`optfactory bench` as users start it: output, files, exit codes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from optfactory.bench import arguments, candidates, device, isolated, measure, session
from optfactory.bench.cases import CASES, Case
from optfactory.bench.results import read_json, to_json
from optfactory.cli import main
from tests.bench.harness import ScriptedDevice, assert_has_the_schema, every_kind
from tests.conftest import missing_gpu

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(capsys):
    """Run the command in this process: exit code, stdout, stderr."""

    def run_command(*words):
        try:
            code = main(["bench", *map(str, words)])
        except SystemExit as stop:  # argparse's own way out
            code = stop.code
        out, err = capsys.readouterr()
        return code, out, err

    return run_command


@pytest.fixture
def scripted(monkeypatch):
    """A device that takes a second for each step, on tiny cases of the usual names."""

    def choose(room=1e12):
        kinds = dict.fromkeys(("cpu", "cuda"), lambda: ScriptedDevice(room=room))
        monkeypatch.setattr(session, "DEVICES", kinds)
        monkeypatch.setattr(ScriptedDevice, "bandwidth", lambda self, quick: 1e9)

    monkeypatch.setattr(measure, "MOST_PAIRS", 0)  # no more than the least
    for name in CASES:
        monkeypatch.setitem(CASES, name, Case(name, f"tiny {name}", ((64,), (8, 64))))
    choose()
    return choose


def rows_of(path):
    return [(row.case, row.dtype, row.optimizer) for row in read_json(path).rows]


# ---- all of it --------------------------------------------------------------------------------


def test_a_quick_run_prints_a_table_and_writes_all_files(run, tmp_path):
    torch.set_num_threads(2)
    files = {key: tmp_path / f"figures.{key}" for key in ("json", "png", "md")}
    code, out, err = run(
        *("--quick", "adamw8bit", "paged_lamb", "--threads", "1"),
        *("--json", files["json"], "--plot", files["png"], "--markdown", files["md"]),
    )
    assert (code, err) == (0, "")
    values = json.loads(files["json"].read_text())
    assert_has_the_schema(values)
    assert values["machine"]["threads"] == 1
    assert torch.get_num_threads() == 2  # as before
    rows = {row["optimizer"]: row for row in values["rows"]}
    expected = ["torch AdamW fused", "torch AdamW foreach", "adamw8bit", "paged_lamb"]
    assert list(rows) == expected
    assert all(row["times_limit"] > 0 and row["times_fused"] > 0 for row in rows.values())
    assert rows["adamw8bit"]["state_bytes_per_param"] < 2.2
    assert rows["paged_lamb"]["state_bytes_per_param"] == pytest.approx(8, rel=0.01)
    name = device.CpuDevice().describe()["device"]
    for text in (name, "ns/param", "x limit", "x fused", *expected):
        assert text in out
        assert text in files["md"].read_text()
    assert files["png"].read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_peak_memory_and_the_first_step_are_measured_in_processes_of_their_own(
    run, tmp_path, monkeypatch
):
    monkeypatch.delenv("OPTFACTORY_BACKEND")
    file = tmp_path / "figures.json"
    code, out, _ = run("--quick", "adamw8bit", "--parts", "memory,startup", "--json", file)
    assert code == 0
    values = json.loads(file.read_text())
    assert_has_the_schema(values)
    assert values["rows"] == []
    assert [row["optimizer"] for row in values["memory"]] == ["torch AdamW fused", "adamw8bit"]
    assert all(row["extra_mib"] < 32 for row in values["memory"])
    starts = [(row["optimizer"], row["cache"]) for row in values["startup"]]
    assert starts == [("adamw8bit", "cold"), ("adamw8bit", "warm")]
    cold, warm = values["startup"]
    assert cold["first"] > warm["first"]  # a compiler ran
    assert cold["imported"] > 0
    assert "peak memory" in out
    assert "overhead" in out


def test_a_process_that_fails_is_an_error_of_ours(monkeypatch, capfd):
    with pytest.raises(isolated.OptFactoryError, match=r"first_step no_such_name .* failed"):
        isolated.startup("no_such_name", "cpu", 1)
    assert "unknown optimizer 'no_such_name'" in capfd.readouterr().err


# ---- what is measured -------------------------------------------------------------------------


def test_every_case_and_dtype_has_its_rows(run, scripted, tmp_path):
    file = tmp_path / "figures.json"
    words = ("adam8bit", "--cases", "small,large", "--dtype", "bfloat16,float32", "--json", file)
    assert run(*words)[0] == 0
    assert rows_of(file) == [
        (case, dtype, name)
        for case in ("small", "large")
        for dtype in ("bfloat16", "float32")
        for name in ("torch AdamW fused", "torch AdamW foreach", "adam8bit")
    ]


def test_slow_ones_are_measured_in_few_cases_unless_they_are_named(
    run, scripted, monkeypatch, tmp_path
):
    build = candidates.build_ours  # without what is for GPUs only
    monkeypatch.setattr(candidates, "build_ours", lambda params, name, **_: build(params, name))
    file = tmp_path / "figures.json"
    words = ("--device", "cuda", "--cases", "1m,100m", "--dtype", "float32", "--json", file)
    assert run(*words)[0] == 0
    slow = "paged_adamw8bit:pinned"
    assert {case for case, _, name in rows_of(file) if name == slow} == {"100m"}
    assert {case for case, _, name in rows_of(file) if name == "adamw8bit"} == {"1m", "100m"}
    assert run(*words, slow)[0] == 0
    assert {case for case, _, name in rows_of(file) if name == slow} == {"1m", "100m"}


def test_what_does_not_fit_is_cut_or_left_out_with_a_note(run, scripted):
    scripted(room=24 * 64)
    code, out, _ = run("adam", "--cases", "large")
    assert code == 0
    assert "tiny large, of which the first 1 of 2 tensors fit" in out
    scripted(room=10)
    code, out, _ = run("adam", "--cases", "large")
    assert code == 0
    assert "all: no room for a tensor of this case" in out


def test_peers_that_are_missing_or_fail_are_reported_and_nothing_fails(
    run, scripted, monkeypatch, tmp_path
):
    there, missing = candidates.Peer("json", "json", "AdamW"), candidates.Peer("nowhere", "n", "A")
    monkeypatch.setattr(candidates, "PEERS", (there, missing))
    file = tmp_path / "figures.json"
    code, out, _ = run("adan", "--peers", "--cases", "large", "--json", file)
    assert code == 0
    assert "nowhere A: not installed" in out
    assert "json AdamW: AttributeError: module 'json' has no attribute 'AdamW'" in out
    assert [name for _, _, name in rows_of(file)][-1] == "adan"
    assert [absent.case for absent in read_json(file).absent] == ["", "large"]


def test_the_bandwidth_is_the_best_that_was_seen_between_the_cases(
    run, scripted, monkeypatch, tmp_path
):
    seen = iter([1e9, 4e9, 2e9])
    monkeypatch.setattr(ScriptedDevice, "bandwidth", lambda self, quick: next(seen))
    file = tmp_path / "figures.json"
    assert run("adam", "--cases", "large,small", "--json", file)[0] == 0
    figures = read_json(file)
    assert figures.bandwidth == 4e9
    for row in figures.rows:  # each step takes a second
        least = row.moved_bytes_per_param * row.elements / 4e9
        assert row.times_limit == pytest.approx(1.0 / least)


def test_figures_are_saved_after_each_case(run, scripted, monkeypatch, tmp_path):
    file = tmp_path / "figures.json"

    def stop(device_, *calls):
        if file.exists() and read_json(file).rows:
            raise KeyboardInterrupt
        return [device.CallFigures() for _ in calls]

    monkeypatch.setattr(ScriptedDevice, "get_ready", stop)
    with pytest.raises(KeyboardInterrupt):
        run("adam", "--cases", "large,small", "--json", file)
    assert {case for case, _, _ in rows_of(file)} == {"large"}


@pytest.mark.gpu
@pytest.mark.skipif(bool(missing_gpu()), reason=missing_gpu() or "a CUDA device is there")
def test_a_quick_run_on_a_gpu(run, tmp_path, monkeypatch):
    monkeypatch.delenv("OPTFACTORY_BACKEND")
    file = tmp_path / "figures.json"
    words = ("--device", "cuda", "--quick", "--parts", "time,startup", "--json", file)
    assert run(*words)[0] == 0
    values = json.loads(file.read_text())
    assert_has_the_schema(values)
    assert torch.cuda.get_device_name(0) in values["machine"]["device"]
    assert all(row["host_ms"] > 0 for row in values["rows"])
    assert {row["optimizer"] for row in values["rows"]} >= set(arguments.DEFAULTS["cuda"].names)


# ---- earlier figures --------------------------------------------------------------------------


def test_figures_of_an_earlier_run_are_shown_without_measuring(run, tmp_path, monkeypatch):
    monkeypatch.setattr(session, "measure", None)
    file = tmp_path / "figures.json"
    file.write_text(to_json(every_kind()))
    code, out, err = run("--from", file, "--plot", tmp_path / "figures.png")
    assert (code, err) == (0, "")
    for text in ("Abacus 2", "torchao AdamW8bit", "1000 tensors of 64", "peak memory", "cold"):
        assert out.count(text) >= 1
    assert (tmp_path / "figures.png").exists()


def test_markdown_on_stdout_is_all_that_is_printed(run, tmp_path):
    file = tmp_path / "figures.json"
    file.write_text(to_json(every_kind()))
    code, out, _ = run("--from", file, "--markdown", "-")
    assert code == 0
    assert out.startswith("Abacus 2")
    assert "| adamw8bit | 0.70 |" in out
    assert "─" not in out


# ---- exit codes -------------------------------------------------------------------------------


def refused(result, code=1):
    assert result[0] == code
    assert result[1] == ""
    return result[2]


def test_an_unknown_name_is_refused_as_elsewhere(run, capsys, tmp_path):
    err = refused(run("adm8bit", "--json", tmp_path / "x.json"))
    assert main(["show", "adm8bit"]) == 1
    assert err == capsys.readouterr().err
    assert err.startswith("error: unknown optimizer 'adm8bit'")
    assert not (tmp_path / "x.json").exists()


def test_a_glob_without_matches_is_refused(run):
    assert refused(run("nosuch*")).startswith("error: no optimizer matches 'nosuch*'")


def test_wrong_usage_exits_with_2(run):
    assert "usage: optfactory bench" in refused(run("--cases", "huge"), code=2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_there_is_a_message(run):
    assert refused(run("--device", "cuda")).startswith("error: --device cuda: torch sees no CUDA")


def test_a_file_without_figures_is_refused(run, tmp_path):
    assert "holds no figures" in refused(run("--from", tmp_path / "nothing.json"))


@pytest.mark.parametrize(
    ("missing", "words"), [("rich", ["--quick"]), ("matplotlib", ["--quick", "--plot", "x.png"])]
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    run, monkeypatch, missing, words
):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == missing else found(name)
    )
    err = refused(run(*words))
    assert f"needs {missing}, which is not installed" in err
    assert 'pip install "optfactory[bench]"' in err


def test_the_command_is_listed_with_the_others(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "bench" in capsys.readouterr().out
    assert arguments.DEFAULTS["cpu"].names[0] == "adamw"


def test_it_runs_as_a_program():
    command = [sys.executable, "-m", "optfactory", "bench", "adm"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "unknown optimizer 'adm'" in done.stderr
