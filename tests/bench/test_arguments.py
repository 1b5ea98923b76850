"""The words behind `optfactory bench`: what they mean, and which are refused."""

import subprocess
import sys
from pathlib import Path

import pytest

from optfactory.bench import arguments
from optfactory.bench.arguments import parse

ROOT = Path(__file__).parents[2]


def refused(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        parse(words)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_what_is_measured_on_cpus_where_nothing_is_said():
    settings = parse([])
    assert settings.device == "cpu"
    assert settings.names == ()
    assert settings.cases == ("large", "gpt2", "small")
    assert settings.dtypes == ("float32",)
    assert settings.parts == ("time",)
    assert (settings.seconds, settings.least_pairs, settings.threads) == (40.0, 5, None)
    assert not settings.peers


def test_what_is_measured_on_gpus_where_nothing_is_said():
    settings = parse(["--device", "cuda"])
    assert settings.dtypes == ("float32", "bfloat16")
    assert settings.cases == ("1m", "100m", "1b", "llama7b", "small2000")


def test_names_may_stand_before_after_and_between_options():
    for words in (
        "adam lamb* --cases large,small --dtype float16 --seconds 0.5",
        "--cases large,small adam --dtype float16 lamb* --seconds 0.5",
        "--cases large,small --dtype float16 --seconds 0.5 adam lamb*",
    ):
        settings = parse(words.split())
        assert settings.names == ("adam", "lamb*")
        assert settings.cases == ("large", "small")
        assert (settings.dtypes, settings.seconds) == (("float16",), 0.5)


def test_quick_is_small_and_short():
    settings = parse(["--device", "cuda", "--quick"])
    assert (settings.cases, settings.seconds, settings.least_pairs) == (("tiny",), 0.0, 2)
    assert settings.dtypes == ("float32", "bfloat16")


def test_memory_may_be_named_on_gpus():
    assert parse(["--device", "cuda", "paged_adam:pinned"]).names == ("paged_adam:pinned",)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--cases huge", "'huge' unknown; choose from large,gpt2"),
        ("--cases large,", "'' unknown"),
        ("--dtype float64", "'float64' unknown; choose from float32,bfloat16,float16"),
        ("--parts times", "choose from time,memory,startup"),
        ("--device tpu", "invalid choice: 'tpu'"),
        ("--seconds 0", "must be a number above 0, got '0'"),
        ("--seconds nan", "must be a number above 0"),
        ("--seconds inf", "must be a number above 0"),
        ("--threads -1", "must be a number above 0"),
        ("--threads 1.5", "must be a number above 0, got '1.5'"),
        ("paged_adam:pinned", "are for --device cuda"),
        ("--quick --seconds 3", "--quick chooses"),
        ("--quick --cases large", "--quick chooses"),
        ("--device cuda --parts memory", "on Linux CPUs only"),
        ("--plot x.png --parts startup", "add time to --parts"),
        ("--plot x.gif", "must end in .png, .pdf, .svg"),
        ("--json no/such/folder/x.json", "no such folder: no/such/folder"),
        ("--markdown no/such/folder/x.md", "no such folder"),
        ("--plot no/such/folder/x.png", "no such folder"),
        ("--from x.json adam", "leave out names"),
        ("--from x.json --dtype float32 --peers", "leave out dtype, peers"),
        ("--frm x.json", "unrecognized arguments"),
    ],
)
def test_wrong_usage_is_refused_before_anything_is_measured(capsys, words, message):
    assert message in refused(capsys, *words.split())


def test_a_file_that_has_no_place_for_the_tables_is_not_overwritten(capsys, tmp_path):
    file = tmp_path / "page.md"
    file.write_text("# Mine\n")
    assert "has no lines <!-- bench -->" in refused(capsys, "--markdown", str(file))
    assert file.read_text() == "# Mine\n"


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_peak_memory_is_measured_on_linux(capsys, monkeypatch, platform):
    monkeypatch.setattr(arguments.sys, "platform", platform)
    if platform == "linux":
        assert parse(["--parts", "memory,time"]).parts == ("memory", "time")
    else:
        assert "on Linux CPUs only" in refused(capsys, "--parts", "memory")


def test_help_and_wrong_usage_need_no_torch():
    code = "import sys\nfrom optfactory.cli import main\ntry:\n main(['bench', %r])\nfinally:\n"
    code += " sys.exit({2: 'torch', 3: ''}[2 if 'torch' in sys.modules else 3])"
    for word in ("--help", "--no-such-option"):
        done = subprocess.run([sys.executable, "-c", code % word], cwd=ROOT, capture_output=True)
        assert b"usage: optfactory bench" in done.stdout + done.stderr
        assert b"torch\n" not in done.stderr
