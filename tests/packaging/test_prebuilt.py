"""Wheels with prebuilt kernels, on a machine without a compiler."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from optfactory.backends.cpu import backend as cpu
from optfactory.build.processor import own_sets, runnable_sets
from tests.conftest import has_compiler
from tests.packaging.conftest import ROOT, Installation, build_wheel, install

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        sys.platform != "linux" or not runnable_sets(), reason="no kernels for this machine"
    ),
    pytest.mark.skipif(not has_compiler(), reason="no C++ compiler to build kernels with"),
]

# All kernels would take minutes; these are what the tests below run.
SETS = [target.name for target in runnable_sets()]
KERNELS = ",".join(
    ["*/adam-float-float-8bit", *(f"{name}/lamb-float-float-8bit" for name in SETS[:1])]
)

# Trains as an argument says, and digests parameters and states; two chunks of work for two threads.
TRAINING = """
import hashlib, json
import torch
from optfactory import build_optimizer

def digest(argument):
    name, _, options = argument.partition(" ")
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(300, 257, generator=generator).requires_grad_()
    optimizer = build_optimizer(name, [p], lr=1e-2, **json.loads(options or "{}"))
    for _ in range(4):
        p.grad = torch.randn(300, 257, generator=generator)
        optimizer.step()
    result = hashlib.sha256()
    for tensor in (p.detach(), *optimizer.state[p].values()):
        result.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return result.hexdigest()
"""
PROGRAM = (
    TRAINING
    + """
import re, sys, warnings
from optfactory.backends import backend_for

seen = []
warnings.showwarning = lambda message, *rest, **more: seen.append(str(message))
torch.set_num_threads(2)
digests = {argument: digest(argument) for argument in sys.argv[1:]}
maps = open("/proc/self/maps").read()
print(json.dumps({
    "backend": backend_for(torch.device("cpu")).name,
    "warnings": seen,
    "digests": digests,
    "kernels": sorted(set(re.findall(r"_prebuilt/(\\S+)-[0-9a-f]+\\.so", maps))),
    "runtimes": sorted(set(re.findall(r"/\\S*lib(?:gomp|iomp5|omp)\\b\\S*", maps))),
}))
"""
)
NAMES = ("adamw8bit", "lamb8bit")


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """A program in an environment that has nothing but these variables: no compiler, no CXX."""
    return subprocess.run(
        command, env={"PATH": "/nonexistent", **environment}, capture_output=True, text=True,
        timeout=300, cwd="/",
    )  # fmt: skip


def train(python: str, *arguments: str, **environment: str) -> dict:
    done = run([python, "-c", PROGRAM, *arguments], **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def digests_here(*arguments: str) -> dict[str, str]:
    """The same training in this process, which runs the checkout and has no prebuilt kernels."""
    assert not (ROOT / "optfactory" / "_prebuilt").exists()
    namespace: dict[str, Callable[[str], str]] = {}
    exec(TRAINING, namespace)
    return {argument: namespace["digest"](argument) for argument in arguments}


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels are compiled here, for the instruction set that the test names."""
    monkeypatch.setenv("OPTFACTORY_BACKEND", "cpu")
    cpu._library.cache_clear()
    yield
    cpu._library.cache_clear()


@pytest.fixture(scope="module")
def wheel_with_kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("kernels"), kernels=KERNELS)


@pytest.fixture(scope="module")
def machine(
    tmp_path_factory: pytest.TempPathFactory, borrowed: Path, wheel_with_kernels: Path
) -> Installation:
    """The wheel in a clean environment."""
    return install(tmp_path_factory.mktemp("prebuilt") / "venv", borrowed, str(wheel_with_kernels))


@pytest.fixture
def unused(tmp_path: Path) -> Path:
    """A kernel cache that must not be made."""
    yield (cache := tmp_path / "cache")
    assert not cache.exists()


# ---- what is in the wheel --------------------------------------------------------------------


def kernels_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist() if name.endswith(".so")}


def test_a_wheel_has_kernels_for_each_instruction_set(wheel_with_kernels):
    names = [
        re.fullmatch(r"optfactory/_prebuilt/(\S+)-[0-9a-f]{24}\.so", name)
        for name in kernels_of(wheel_with_kernels)
    ]
    expected = [f"{target.name}/adam-float-float-8bit" for target in own_sets()]
    expected += [f"{SETS[0]}/lamb-float-float-8bit"] * 2  # one for each kind of trust ratio
    assert sorted(name[1] for name in names) == sorted(expected)


def test_its_name_and_metadata_say_where_it_runs(wheel_with_kernels):
    tag = re.fullmatch(
        r"optfactory-\S+-(py3-none-manylinux_2_\d+_\w+)\.whl", wheel_with_kernels.name
    )
    assert tag[1].endswith(own_sets()[0].machine)
    with zipfile.ZipFile(wheel_with_kernels) as archive:
        (path,) = (name for name in archive.namelist() if name.endswith(".dist-info/WHEEL"))
        lines = archive.read(path).decode().splitlines()
    assert f"Tag: {tag[1]}" in lines
    assert "Root-Is-Purelib: false" in lines


def test_kernels_need_no_library_that_a_machine_may_lack(wheel_with_kernels):
    for library in kernels_of(wheel_with_kernels).values():
        assert b"GOMP_parallel\0" in library
        assert set(re.findall(rb"lib[\w+-]+\.so[.\d]*", library)) <= {b"libc.so.6", b"libm.so.6"}


def test_other_wheels_have_none(wheel, tmp_path):
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not kernels_of(wheel)
    build = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=300)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        assert any(name.endswith("/optfactory/build/wheel/hook.py") for name in archive.getnames())
    built = build_wheel(tmp_path / "from_sdist", sdist, kernels="auto")
    assert built.name == wheel.name
    assert not (ROOT / "optfactory" / "_prebuilt").exists()


def test_kernels_that_were_asked_for_and_cannot_be_built_stop_the_build(tmp_path, monkeypatch):
    with pytest.raises(AssertionError, match="no kernels to build for 'x86-64-v9/\\*'"):
        build_wheel(tmp_path, kernels="x86-64-v9/*")
    monkeypatch.setenv("CXX", "not-there")
    with pytest.raises(AssertionError, match="no C\\+\\+ compiler was found"):
        build_wheel(tmp_path, kernels="1")
    assert not list(tmp_path.glob("*.whl"))


def test_without_a_compiler_the_wheel_is_built_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "not-there")
    built = build_wheel(tmp_path, kernels="auto")
    assert built.name.endswith("-py3-none-any.whl")


# ---- what it does where there is no compiler -------------------------------------------------


@pytest.mark.usefixtures("compiled")
def test_kernels_run_without_a_compiler_and_write_no_cache(machine, unused, monkeypatch):
    seen = train(machine.python, *NAMES, OPTFACTORY_CACHE=str(unused))
    assert seen["backend"] == "cpu"
    assert seen["warnings"] == []
    assert seen["kernels"] == [f"{SETS[0]}/{rule}-float-float-8bit" for rule in ("adam", "lamb")]
    assert len(seen["runtimes"]) == 1, "a second OpenMP runtime has threads of its own"
    monkeypatch.setenv("OPTFACTORY_INSTRUCTIONS", "native")
    assert seen["digests"] == digests_here(*NAMES)


@pytest.mark.parametrize("target", SETS[1:])
@pytest.mark.usefixtures("compiled")
def test_those_of_lesser_processors_compute_the_bits_that_compiled_ones_do(
    target, machine, unused, monkeypatch
):
    variables = {"OPTFACTORY_INSTRUCTIONS": target, "OPTFACTORY_CACHE": str(unused)}
    seen = train(machine.python, "adamw8bit", **variables)
    assert seen["kernels"] == [f"{target}/adam-float-float-8bit"]
    monkeypatch.setenv("OPTFACTORY_INSTRUCTIONS", target)
    assert seen["digests"] == digests_here("adamw8bit")


def test_what_has_no_prebuilt_kernel_runs_on_torch_after_one_warning_each(
    machine, unused, monkeypatch
):
    uncommon = ['adamw {"skip_zeros": true}', "adamw"]
    seen = train(machine.python, *uncommon, *uncommon, "lamb8bit", OPTFACTORY_CACHE=str(unused))
    assert seen["backend"] == "cpu"
    assert seen["kernels"] == [f"{SETS[0]}/lamb-float-float-8bit"]
    assert len(seen["warnings"]) == 2
    for warning, state in zip(
        seen["warnings"], ("float32 state, skips_zeros: True,", "float32 state, and"), strict=True
    ):
        for word in (state, "'adam'", "no C++ compiler", "g++", "CXX"):
            assert word in warning
    monkeypatch.setenv("OPTFACTORY_BACKEND", "reference")
    assert digests_here(*uncommon) == {name: seen["digests"][name] for name in uncommon}


CUSTOM = """
import warnings
import torch
from optfactory import Optimizer2State, resolve
from optfactory.rules.language import StateSpec, UpdateRule

config = resolve("adamw8bit")
class Custom(type(config)):
    @classmethod
    def rule(cls, group):
        return UpdateRule("custom", super().rule(group).states, super().rule(group).scalars)

p, q = torch.ones(80, 64, requires_grad=True), torch.ones(80, 64, requires_grad=True)
for parameter, kind in ((p, type(config)), (q, Custom)):
    optimizer = Optimizer2State([parameter], kind.model_validate(config.model_dump()))
    parameter.grad = torch.full_like(parameter, 0.5)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        optimizer.step()
        optimizer.step()
    print(len(seen), *(item.message for item in seen))
assert torch.equal(p, q)
"""


def test_a_custom_rule_runs_on_torch_after_a_warning(machine, unused):
    rules = machine.site_packages / "optfactory" / "kernels" / "rules"
    # Adam's text with a comment: to the kernels another rule.
    (rules / "custom.cuh").write_text("// mine\n" + (rules / "adam.cuh").read_text())
    done = run([machine.python, "-c", CUSTOM], OPTFACTORY_CACHE=str(unused))
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "0"
    assert second.startswith("1 there is no prebuilt kernel of the rule 'custom'")


STOPPED = """
import torch
from optfactory import build_optimizer
from optfactory.errors import NoCompilerError

parameters = [torch.ones(80, 64).requires_grad_(), torch.ones(80, 64).bfloat16().requires_grad_()]
optimizer = build_optimizer("adamw8bit", parameters)
for p in parameters:
    p.grad = torch.ones_like(p)
try:
    optimizer.step()
except NoCompilerError as error:
    print(error)
for p in parameters:
    assert (p == 1).all() and optimizer.state[p]["step"] == 0
"""


def test_insisting_on_kernels_stops_before_anything_is_changed(machine, unused):
    insisting = {"OPTFACTORY_BACKEND": "cpu", "OPTFACTORY_CACHE": str(unused)}
    done = run([machine.python, "-c", STOPPED], **insisting)
    assert done.returncode == 0, done.stderr
    assert "adam-bfloat16-bfloat16-8bit: no C++ compiler" in done.stdout
