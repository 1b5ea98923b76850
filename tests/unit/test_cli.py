"""The command `optfactory`: what it prints, where, and its exit codes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from optfactory import __version__, list_optimizers, resolve
from optfactory.catalog.files import config_folder, write_files
from tests.command_line import ok, refused, runner

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(capsys):
    """Run a command in this process: exit code, stdout, stderr."""
    return runner(capsys)


@pytest.fixture
def file(tmp_path):
    def write(text, name="config.yaml"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


# list


@pytest.mark.parametrize("glob", ["", "*8bit", "paged_lamb*"])
def test_list_prints_each_name_that_matches_with_a_description(run, glob):
    lines = ok(run("list", *([glob] if glob else []))).splitlines()
    assert [line.split()[0] for line in lines] == list_optimizers(glob)
    assert all(len(line.split()) > 3 for line in lines)


def test_list_as_json(run):
    rows = json.loads(ok(run("list", "--json")))
    assert [row["name"] for row in rows] == list_optimizers()
    row = next(row for row in rows if row["name"] == "paged_adamw8bit")
    assert (row["family"], row["optim_bits"], row["is_paged"]) == ("adamw", 8, True)
    assert "bnbpagedadamw8bit" in row["aliases"]


def test_a_glob_that_matches_nothing_says_so(run):
    assert run("list", "nosuch*") == (0, "", "no optimizer matches 'nosuch*'\n")
    assert run("list", "nosuch*", "--json") == (0, "[]\n", "")


# show


def test_show_prints_the_full_config_as_yaml_that_reads_back(run):
    out = ok(run("show", "lamb8bit"))
    assert yaml.safe_load(out) == resolve("lamb8bit").model_dump(mode="json")
    assert "learning rate" in out


def test_show_applies_overrides_as_hydra_does(run):
    out = ok(run("show", "lamb", "lr=3e-4", "betas=[0.8,0.95]", "+trust_ratio=clip", "~eps"))
    expected = resolve("lamb", lr=3e-4, betas=(0.8, 0.95), trust_ratio="clip")
    assert yaml.safe_load(out) == expected.model_dump(mode="json")


def test_show_as_json_takes_overrides_on_either_side_of_the_option(run):
    expected = resolve("adam", lr=0.5, amsgrad=True).model_dump(mode="json")
    for words in (
        ("--json", "adam", "lr=0.5", "amsgrad=true"),
        ("adam", "--json", "lr=0.5", "amsgrad=true"),
        ("adam", "lr=0.5", "--json", "amsgrad=true"),
        ("adam", "lr=0.5", "amsgrad=true", "--json"),
    ):
        assert json.loads(ok(run("show", *words))) == expected


@pytest.mark.parametrize("alias", ["PagedAdamW8bit", "paged_adamw_8bit", "bnb_paged_adamw8bit"])
def test_show_resolves_aliases(run, alias):
    assert yaml.safe_load(ok(run("show", alias, "lr=1")))["name"] == "paged_adamw8bit"


def test_an_unknown_name_is_refused_with_a_suggestion(run):
    assert "Did you mean 'adam8bit'?" in refused(run("show", "adm8bit"))


# check


@pytest.mark.parametrize("name", ["lion4bit", "PagedLion4bit", "muon_4bit"])
def test_a_name_that_a_family_does_not_have_says_why(run, name):
    code, _, err = run("show", name)
    assert code == 1
    assert err.startswith(f"error: there is no optimizer '{name}': 4bit is too coarse for ")
    assert "unknown" not in err


@pytest.mark.parametrize("node", ["${oc.env:NO_SUCH_VARIABLE}", "${missing}", "${optimizer}"])
@pytest.mark.parametrize("command", ["check", "show"])
def test_a_node_that_cannot_be_resolved_is_told(run, file, command, node):
    path = file(f"optimizer: {node}\n")
    code, _, err = run(command, path)
    assert code == 1
    assert f"{path}: the key 'optimizer' cannot be resolved: " in err


def test_a_defaults_list_that_is_none_is_told(run, file):
    code, _, err = run("check", file("defaults: 3\noptimizer: {name: adam}\n"))
    assert code == 1
    assert "Hydra cannot compose" in err


def test_check_accepts_a_name_with_overrides(run):
    assert "valid config for optimizer 'adam8bit'" in ok(run("check", "Adam_8bit", "lr=1e-2"))


def test_check_reports_every_problem_at_once(run):
    err = refused(run("check", "adam8bit", "betas=[0.9,1.0]", "optim_bits=32", "lrr=1", "lr=true"))
    for part in (
        "optimizer.betas.1:",
        "optimizer.optim_bits:",
        "did you mean 'lr'",
        "optimizer.lr:",
    ):
        assert part in err
    assert err.startswith("error: invalid config for optimizer 'adam8bit', 4 problem(s)")


def test_errors_are_json_on_stderr_when_asked(run):
    error = json.loads(refused(run("check", "adam8bit", "lr=-1", "--json")))["error"]
    assert error["type"] == "ConfigError"
    assert "optimizer.lr:" in error["message"]


def test_check_reads_an_optimizers_own_file(run, file):
    path = file("name: adamw_bnb_8bit\neps: 1e-8\n")
    result = json.loads(ok(run("check", path, "--json", "lr=0.25")))
    expected = resolve("adamw8bit", lr=0.25).model_dump(mode="json")
    assert result == {"valid": True, "config": expected}


def test_check_reads_an_apps_file_and_its_interpolations(run, file):
    path = file("peak: 0.5\noptimizer: {name: lamb8bit, lr: '${peak}'}\nsteps: 3\n")
    result = json.loads(ok(run("check", path, "optimizer.eps=0.1", "peak=0.7", "--json")))
    assert result["config"] == resolve("lamb8bit", lr=0.7, eps=0.1).model_dump(mode="json")
    assert "optimizer.lr:" in refused(run("check", path, "peak=-1"))


@pytest.fixture
def composed(file):
    """An app's config that Hydra has to compose."""
    return file(
        "defaults: [{optimizer: paged_adam8bit}, _self_]\n"
        "hydra: {searchpath: ['pkg://optfactory.configs']}\n"
        "optimizer: {lr: 0.5}\n"
        "seed: 1\n"
    )


def test_check_composes_an_apps_defaults_list(run, composed):
    result = json.loads(ok(run("check", composed, "--json")))
    assert result["config"] == resolve("paged_adam8bit", lr=0.5).model_dump(mode="json")
    words = ("optimizer=lamb8bit", "optimizer.eps=0.1", "~optimizer.betas", "seed=2")
    result = json.loads(ok(run("check", composed, *words, "--json")))
    assert result["config"] == resolve("lamb8bit", lr=0.5, eps=0.1).model_dump(mode="json")


@pytest.mark.parametrize("override", ["optimizer.lrr=3", "+optimizer.lrr=3", "++optimizer.lrr=3"])
def test_an_unknown_key_in_a_composed_config_gets_a_suggestion(run, composed, override):
    assert "optimizer.lrr: unknown key; did you mean 'lr'?" in refused(
        run("check", composed, override)
    )


def test_a_config_that_hydra_cannot_compose_is_invalid(run, composed):
    err = refused(run("check", composed, "optimizer=nosuch"))
    assert "Could not find 'optimizer/nosuch'" in err
    assert "adam8bit" in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1\n", "cannot be read as YAML"),
        ("- 1\n- 2\n", "must hold a mapping"),
        ("optimizer: adam8bit\n", "must have a mapping under the key 'optimizer'"),
        ("lr: 0.1\n", "no key 'name'"),
        ("optimizer: {name: adam, lr: '${nowhere}'}\n", "optimizer"),
        ("name: adam\nlr: ???\n", "lr"),
    ],
)
def test_a_file_that_is_no_config_is_invalid(run, file, text, message):
    assert message in refused(run("check", file(text)))


# overrides


def test_nested_keys_are_set_and_removed(run, file):
    path = file("optimizer: {name: adam, lr: 0.5, lrr: 1}\n")
    assert "valid" in ok(run("check", path, "~optimizer.lrr"))
    assert "valid" in ok(run("check", path, "~optimizer.lrr=1"))
    assert "'optimizer.lrr' is 1" in refused(run("check", path, "~optimizer.lrr=2"))


@pytest.mark.parametrize("override", ["~lrr", "~lr.deeper", "~no.such"])
def test_removing_a_key_that_is_not_there_is_refused(run, override):
    assert f"there is no key '{override[1:]}'" in refused(run("show", "adam", override))


def test_a_quoted_text_with_commas_is_one_value(run):
    out = ok(run("show", "adam", "betas='(0.5, 0.75)'"))
    assert yaml.safe_load(out)["betas"] == [0.5, 0.75]


# usage


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("lst",),
        ("list", "--jsn"),
        ("show",),
        ("show", "adam", "--verbose"),
        ("configs",),
        ("configs", "--write", "--check"),
        ("show", "adam", "lr"),
        ("show", "adam", "betas=[0.9"),
        ("show", "adam", "lr=1,2"),
        ("show", "adam", "optimizer@x=adam"),
        ("check", "no_such_file.yaml"),
        ("check", "no/such/file"),
    ],
)
def test_wrong_usage_exits_with_2(run, words):
    assert refused(run(*words), code=2)


def test_help_and_version(run):
    assert ok(run("--version")) == f"optfactory {__version__}\n"
    for command in ("list", "show", "check", "configs"):
        assert command in ok(run("--help"))
        assert "--json" in ok(run(command, "--help"))


def test_the_module_runs_as_a_program():
    for words, code in ((["list"], 0), (["check", "adam", "lr=-1"], 1), (["list", "-x"], 2)):
        command = [sys.executable, "-m", "optfactory", *words]
        assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == code


def run_without_a_reader(*words):
    """The command with a stdout whose reader has left, as `| head` does."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        return subprocess.run(
            [sys.executable, "-m", "optfactory", *map(str, words)],
            cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=300,
        )  # fmt: skip
    finally:
        os.close(writer)


@pytest.mark.parametrize(
    "words", [["list"], ["list", "--json"], ["schema"], ["show", "adam"], ["--help"]]
)
def test_a_reader_that_leaves_early_is_no_error(words):
    done = run_without_a_reader(*words)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_is_wrong_is_told_without_a_reader_too():
    done = run_without_a_reader("show", "adam", "lr=-1")
    assert done.returncode == 1
    assert done.stderr.startswith("error: invalid config")


def test_files_are_written_when_the_reader_left_early(tmp_path):
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    figures, picture = ROOT / "examples" / "results" / "readme.json", tmp_path / "bench.png"
    done = run_without_a_reader("bench", "--from", figures, "--plot", picture)
    assert (done.returncode, done.stderr) == (0, "")
    assert picture.stat().st_size > 1000


def test_without_hydra_names_work_and_overrides_say_what_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "hydra", None)
    ok(run("show", "adam8bit"))
    err = refused(run("show", "adam8bit", "lr=1"))
    assert "pip install 'hydra-core" in err


# configs


def test_configs_check_passes_in_this_checkout(run):
    assert str(config_folder()) in ok(run("configs", "--check"))


def test_configs_check_reports_drift_and_write_mends_it(run, monkeypatch, tmp_path):
    monkeypatch.setattr("optfactory.catalog.files.config_folder", lambda: tmp_path)
    write_files(tmp_path)
    (tmp_path / "adam.yaml").write_text("name: adam\n")
    err = refused(run("configs", "--check"))
    assert "adam.yaml: differs from the schema" in err
    assert "optfactory configs --write" in err
    code, out, _ = run("configs", "--check", "--json")
    assert (code, json.loads(out)) == (1, {"problems": ["adam.yaml: differs from the schema"]})
    assert json.loads(ok(run("configs", "--write", "--json"))) == {"changed": ["adam.yaml"]}
    assert "up to date" in ok(run("configs", "--check"))
