"""`optfactory doctor`: what it finds, and that whatever is broken is said and not raised."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from optfactory import __version__, doctor
from optfactory.cli import main
from optfactory.optimizer import Optimizer2State
from tests.conftest import has_compiler
from tests.unit.harness import needs_compiler, without

ROOT = Path(__file__).parents[2]
VARIABLES = ("OPTFACTORY_BACKEND", "OPTFACTORY_INSTRUCTIONS", "CXX")
COMPILE = {"OPTFACTORY_INSTRUCTIONS": "native"}  # no prebuilt kernels, also where there are some

# One process loads torch; each line on its stdin is a fork of it with another environment, since a
# process keeps the backend and the compiler that it found first.
FORKING = """
import json, os, sys, tempfile
import optfactory.doctor, optfactory.optimizer
import torch._dynamo  # which any optimizer of torch loads, for a second
from optfactory.cli import main

for line in sys.stdin:
    words, environment = json.loads(line)
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if not child:
            os.environ.update(environment)
            os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
            code = 99  # of an exception
            try:
                code = main(["doctor", *words])
            finally:
                sys.stdout.flush(), os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = [(file.seek(0), file.read())[1] for file in (out, err)]
    print(json.dumps([code, *texts]), flush=True)
"""

Ask = Callable[..., tuple[int, str]]
Found = dict[str, dict[str, str]]
Find = Callable[..., tuple[int, Found]]


@pytest.fixture(scope="module")
def ask() -> Any:
    """Runs `optfactory doctor` in a fork with these variables: exit code and stdout."""
    environment = {key: value for key, value in os.environ.items() if key not in VARIABLES}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", FORKING], env=environment, **pipes)
    assert process.stdin
    assert process.stdout

    def run(*words: str, **environment: str) -> tuple[int, str]:
        process.stdin.write(json.dumps([words, environment]) + "\n")
        process.stdin.flush()
        code, out, err = json.loads(process.stdout.readline())
        assert err == ""  # no traceback, no warning
        return code, out

    yield run
    process.stdin.close()
    assert process.wait(timeout=30) == 0
    process.stdout.close()


@pytest.fixture
def found(ask: Ask) -> Find:
    """The same with --json, by what was looked at; every finding has all of its parts."""

    def run(**environment: str) -> tuple[int, Found]:
        code, out = ask("--json", **environment)
        findings = json.loads(out)
        assert all(f.keys() == {"what", "status", "found", "remedy"} for f in findings)
        assert {f["status"] for f in findings} <= {"ok", "note", "broken"}
        assert code == any(f["status"] == "broken" for f in findings)
        names = [f["what"] for f in findings]
        assert len(names) == len(set(names))
        return code, {f["what"]: f for f in findings}

    return run


def told(findings: Found, status: str) -> str:
    """All that findings of a status say."""
    return "\n".join(
        f"{f['found']} {f['remedy']}" for f in findings.values() if f["status"] == status
    )


# ---- this machine -----------------------------------------------------------------------------


def test_nothing_is_broken_here(found: Find) -> None:
    code, findings = found()
    assert code == 0
    assert findings["optfactory"]["found"] == __version__
    for what in ("Python", "torch", "pydantic", "hydra-core", "omegaconf", "processor"):
        assert findings[what]["status"] == "ok"
    assert findings["kernel cache"]["found"].startswith(os.environ["OPTFACTORY_CACHE"])
    assert {"CUDA", "C++ compiler", "step on cpu"} <= findings.keys()
    if has_compiler():
        step = findings["step on cpu"]
        assert (step["status"], step["remedy"]) == ("ok", "")
        assert "backend 'cpu'" in step["found"]


def test_as_text_there_is_a_line_for_each_finding_and_its_remedy(ask: Ask) -> None:
    code, out = ask(OPTFACTORY_BACKEND="nonsense")
    lines = out.splitlines()
    assert code == 1
    assert {line.split()[0] for line in lines} <= {"ok", "note", "broken", "->"}
    broken = next(i for i, line in enumerate(lines) if line.startswith("broken"))
    assert lines[broken + 1].startswith(" " * 31 + "-> ")


def test_it_runs_as_a_program() -> None:
    command = [sys.executable, "-m", "optfactory", "doctor", "--json"]
    done = subprocess.run(
        command, cwd="/", env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)[0] == doctor.Finding("optfactory", "ok", __version__).as_dict()


# ---- what users set ---------------------------------------------------------------------------


def test_variables_that_are_set_are_noted(found: Find) -> None:
    findings = found(OPTFACTORY_BACKEND="reference")[1]
    assert findings["OPTFACTORY_BACKEND"]["status"] == "note"
    assert "'reference'" in findings["OPTFACTORY_BACKEND"]["found"]
    assert findings["step on cpu"]["status"] == "ok"
    assert "as OPTFACTORY_BACKEND asks" in findings["step on cpu"]["found"]


def test_a_backend_that_does_not_exist(found: Find) -> None:
    findings = found(OPTFACTORY_BACKEND="nonsense")[1]
    assert findings["step on cpu"]["status"] == "broken"
    assert "allowed are auto, cpu, reference" in findings["step on cpu"]["remedy"]
    assert findings["kernel cache"]["status"] == "ok"  # what is behind it is looked at all the same


def test_no_compiler_is_a_note(found: Find) -> None:
    code, findings = found(CXX="no-such-compiler", **COMPILE)
    assert code == 0
    assert findings["C++ compiler"]["status"] == findings["step on cpu"]["status"] == "note"
    assert "CXX" in findings["C++ compiler"]["remedy"]
    assert "plain torch operations" in findings["step on cpu"]["found"]


def failing_compiler(folder: Path) -> str:
    script = folder / "failing-c++"
    script.write_text("#!/bin/sh\necho one >&2\necho two >&2\nexit 1\n")
    script.chmod(0o700)
    return str(script)


def test_a_compiler_that_fails_is_shown_with_all_that_it_says(found: Find, tmp_path: Path) -> None:
    cxx = failing_compiler(tmp_path)
    code, findings = found(CXX=cxx, OPTFACTORY_CACHE=str(tmp_path / "cache"), **COMPILE)
    assert code == 1
    compiler, step = findings["C++ compiler"], findings["step on cpu"]
    assert compiler["status"] == "broken"
    assert compiler["found"] == f"the C++ compiler {cxx} builds nothing\none\ntwo"
    assert "CXX" in compiler["remedy"]
    assert "OPTFACTORY_BACKEND=reference" in compiler["remedy"]
    assert step["status"] == "note"
    assert "plain torch operations, because what the compiler builds" in step["found"]


def test_lines_of_a_compiler_stay_in_their_column(ask: Ask, tmp_path: Path) -> None:
    _, out = ask(CXX=failing_compiler(tmp_path), OPTFACTORY_CACHE=str(tmp_path / "c"), **COMPILE)
    assert f"\n{'':31}one\n{'':31}two\n{'':31}-> mend it" in out


def test_insisting_on_a_compiler_that_fails(found: Find, tmp_path: Path) -> None:
    environment = {"CXX": failing_compiler(tmp_path), "OPTFACTORY_CACHE": str(tmp_path / "cache")}
    _, findings = found(OPTFACTORY_BACKEND="cpu", **environment, **COMPILE)
    assert findings["step on cpu"]["status"] == "broken"
    assert findings["step on cpu"]["found"].endswith("one\ntwo")


@needs_compiler
def test_a_compiler_without_openmp_is_a_note(found: Find, tmp_path: Path) -> None:
    environment = {"CXX": without("-fopenmp", tmp_path), "OPTFACTORY_CACHE": str(tmp_path / "c")}
    code, findings = found(**environment, **COMPILE)
    assert code == 0
    assert findings["C++ compiler"]["status"] == "note"
    assert "does not take -fopenmp" in findings["C++ compiler"]["found"]
    assert "libomp" in findings["C++ compiler"]["remedy"]
    assert "degraded kernels" not in findings  # none was there yet
    findings = found(**environment, **COMPILE)[1]
    assert findings["degraded kernels"]["found"].startswith("1 in the cache")
    assert findings["step on cpu"]["status"] == "ok"


@pytest.mark.parametrize("place", ["/proc/no/such", "/dev/null", "/dev/null/below", "{}", "{}/sub"])
def test_a_cache_that_cannot_be_used(place: str, found: Find, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    folder = place.format(file)
    code, findings = found(OPTFACTORY_CACHE=folder, **COMPILE)
    assert code == 1
    broken = told(findings, "broken")
    assert folder in broken
    assert "set OPTFACTORY_CACHE to a folder" in broken
    assert findings["step on cpu"]["status"] == "broken"


def test_a_cache_that_others_can_write_to(found: Find, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    findings = found(OPTFACTORY_CACHE=str(tmp_path), **COMPILE)[1]
    assert "can be written by others" in told(findings, "broken")


@pytest.mark.parametrize("choice", ["nonsense", "armv8-a", ""])
def test_instructions_that_do_not_exist_here(choice: str, found: Find) -> None:
    code, findings = found(OPTFACTORY_INSTRUCTIONS=choice)
    assert code == 1
    assert f"OPTFACTORY_INSTRUCTIONS is {choice!r}" in findings["instructions"]["found"]
    assert "allowed are auto, native" in findings["instructions"]["remedy"]
    assert findings["processor"]["status"] == "ok"


@pytest.mark.parametrize("command", ['"g++', "{script}", "true"])
def test_compilers_that_cannot_even_be_started_leave_no_traceback(
    command: str, found: Find, tmp_path: Path
) -> None:
    script = tmp_path / "c++"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o700)
    cache = tmp_path / "cache"
    code, findings = found(
        CXX=command.format(script=script), OPTFACTORY_CACHE=str(cache), **COMPILE
    )
    assert code == 1
    assert told(findings, "broken")
    assert findings["kernel cache"]["status"] == "ok"


# ---- kernels that compute something else ------------------------------------------------------


@pytest.mark.parametrize("error", [1e-3, float("nan")])
def test_a_kernel_that_computes_wrongly_is_broken(
    error: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = Optimizer2State.step

    def wrong(self: Optimizer2State) -> None:
        right(self)
        with torch.no_grad():
            self.param_groups[0]["params"][0].view(-1)[4097] += error

    monkeypatch.setattr(Optimizer2State, "step", wrong)
    assert main(["doctor", "--json"]) == 1
    findings = {f["what"]: f for f in json.loads(capsys.readouterr().out)}
    assert findings["step on cpu"]["status"] == "broken"
    assert "is wrong by" in findings["step on cpu"]["found"]
    assert "report" in findings["step on cpu"]["remedy"]


def test_a_check_that_raises_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "runnable_sets", lambda: 1 // 0)
    findings = doctor.checks()
    broken = [finding.found for finding in findings if finding.status == "broken"]
    assert broken == ["ZeroDivisionError: integer division or modulo by zero"]
    assert findings[-1].what.startswith("step on")


def test_an_old_torch_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    for version, status in (("2.5.1+cu121", "broken"), ("2.6.0", "ok"), ("2.14.0a0+git1", "ok")):
        monkeypatch.setattr(torch, "__version__", version)
        finding = next(f for f in doctor.checks() if f.what == "torch")
        assert (finding.status, finding.found) == (status, version)
        assert ("2.6 or newer" in finding.remedy) == (status == "broken")
