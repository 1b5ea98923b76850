"""Which kernels wheels carry, and on which systems they then run."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from itertools import chain, product
from pathlib import Path

import pytest
import torch

from optfactory import build_optimizer, families, list_optimizers
from optfactory.backends.cpu import backend as cpu
from optfactory.build.processor import own_sets
from optfactory.build.wheel import kernels
from optfactory.build.wheel.variants import prebuilt_variants
from optfactory.errors import ConfigError
from optfactory.optimizers.adam import AdamConfig
from optfactory.step.matrices import MatrixWork
from tests.families import selections
from tests.unit.harness import NAMES

ROOT = Path(__file__).parents[2]
ADAM_TEXT = ROOT / "kernels" / "rules" / "adam.cuh"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def needed(name: str, parameter: torch.dtype, gradient: torch.dtype, **options) -> set:
    """The kernels of a step with a large and a small parameter."""
    parameters = [torch.zeros(n, 64, dtype=parameter, requires_grad=True) for n in (64, 2)]
    for p in parameters:
        if hasattr(p, "grad_dtype"):  # newer torch asks for leave
            p.grad_dtype = gradient
        p.grad = torch.zeros(p.shape, dtype=gradient)
    optimizer = build_optimizer(name, parameters, **options)
    optimizer.init_states()
    plan = optimizer._current_plan()
    works = plan.scratch.works(plan.gather())
    parts = [[w.direction, w.step] if isinstance(w, MatrixWork) else [w] for w in works]
    return {cpu._variant(bucket.key) for bucket in chain.from_iterable(parts)}


@pytest.mark.parametrize("name", NAMES)
def test_every_name_runs_on_prebuilt_kernels_in_all_dtypes(name):
    for options, parameter in product(selections(name), DTYPES):
        for gradient in {parameter, torch.float32}:
            assert needed(name, parameter, gradient, **options) <= set(prebuilt_variants())


def test_nothing_else_is_built():
    assert len(set(prebuilt_variants())) == len(prebuilt_variants())
    used = set()
    for name in list_optimizers(exclude_filters="paged*"):
        for options, parameter in product(selections(name), DTYPES):
            for gradient in {parameter, torch.float32}:
                used |= needed(name, parameter, gradient, **options)
    assert used == set(prebuilt_variants())


def test_families_of_other_packages_are_not_built(monkeypatch):
    class OtherConfig(AdamConfig):
        family = "other"

        @classmethod
        def rule(cls, group):
            return replace(super().rule(group), name="other", text=ADAM_TEXT.read_text())

    monkeypatch.setattr(families, "_registered", {})
    families.register(OtherConfig)
    assert "other8bit" in list_optimizers()
    assert prebuilt_variants() == prebuilt_variants()


# ---- the part that is asked for --------------------------------------------------------------


@pytest.mark.skipif(not own_sets(), reason="no kernels for this kind of machine")
def test_globs_select_a_part():
    sets = own_sets()
    assert kernels.jobs([]) == [
        (variant, target) for target in sets for variant in prebuilt_variants()
    ]
    best = kernels.jobs([f"{sets[0].name}/*-8bit"])
    assert best == [
        (variant, sets[0]) for variant in prebuilt_variants() if variant.label.endswith("-8bit")
    ]
    both = kernels.jobs([f"{sets[0].name}/adam-float-float-8bit", "*/lamb-float16-*-32bit"])
    assert {variant.rule.name for variant, _ in both} == {"adam", "lamb"}
    with pytest.raises(ConfigError, match=r"no kernels to build for '\*/nosuch-\*'; there are"):
        kernels.jobs(["*/adam-*", "*/nosuch-*"])


def test_other_kinds_of_machines_have_none(monkeypatch):
    monkeypatch.setattr(kernels, "own_sets", list)
    with pytest.raises(ConfigError, match="this kind of machine"):
        kernels.jobs([])


# ---- the platform tag ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("libraries", "tag"),
    [
        ([], "manylinux_2_17_x86_64"),
        ([b"\0GLIBC_2.2.5\0memcpy\0GLIBC_2.14\0"], "manylinux_2_17_x86_64"),
        ([b"\0GLIBC_2.2.5\0", b"\0expf\0GLIBC_2.27\0"], "manylinux_2_27_x86_64"),
        ([b"\0GLIBC_2.9\0", b"\0GLIBC_2.34\0GLIBC_2.4\0"], "manylinux_2_34_x86_64"),
        ([b"\0GLIBCXX_3.4.32\0XGLIBC_2.99\0"], "manylinux_2_17_x86_64"),
    ],
)
def test_the_tag_is_of_the_oldest_glibc_with_all_symbols(libraries, tag):
    assert kernels.platform_tag("x86_64", libraries) == tag


# What the hook's dependencies in pyproject.toml bring (pydantic, pyyaml), and the package itself.
AT_HAND = {
    *("optfactory", "pydantic", "pydantic_core", "annotated_types", "typing_extensions"),
    *("typing_inspection", "yaml", "_yaml"),
}


def test_what_a_wheel_carries_is_known_by_what_an_isolated_build_has() -> None:
    code = "import sys; before = set(sys.modules)\n"
    code += "from optfactory.build.wheel.variants import prebuilt_variants\n"
    code += "from optfactory.rules.codegen import cpp_source\n"
    code += "found = prebuilt_variants(); assert len(cpp_source(found[-1])) > 10_000\n"
    code += "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
    code += "print(len(found), *sorted(new - set(sys.stdlib_module_names)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    count, *loaded = done.stdout.split()
    assert int(count) == len(prebuilt_variants())
    own = ("cython", "_cython", "_sysconfigdata")  # of yaml's and of Python's own
    assert {name for name in loaded if not name.startswith(own)} <= AT_HAND
