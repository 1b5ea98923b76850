"""Rule texts: what may stand in one, and the 16-bit floats of the kernels made from them."""

from __future__ import annotations

import ctypes
import gc
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from optfactory import list_optimizers
from optfactory.build.compiler import compile_library
from optfactory.errors import ConfigError
from optfactory.rules import language
from optfactory.rules.codegen import KernelVariant, cpp_source, cuda_source
from optfactory.rules.language import (
    FUNCTIONS,
    StateSpec,
    UpdateRule,
    read_trust_ratio_text,
    read_update_text,
)
from optfactory.rules.parts import parts_of
from optfactory.rules.resources import data_dir
from optfactory.state.specs import EXTRA_KEYS
from tests.conftest import has_compiler
from tests.families import has_ratio, selections
from tests.families import rule_of as rule_of_name

RULE = UpdateRule(
    "probe",
    (StateSpec("exp_avg", signed=True), StateSpec("exp_avg_sq", signed=False)),
    ("beta1", "beta2"),
    trust_ratio="probe",
)
GOOD = "exp_avg = g;\nexp_avg_sq = g * g;\nu = exp_avg;\n"


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that takes the place of kernels/."""
    (tmp_path / "rules").mkdir()
    (tmp_path / "trust_ratios").mkdir()
    monkeypatch.setattr(language, "data_dir", lambda kind: tmp_path)
    language._read.cache_clear()
    yield tmp_path
    language._read.cache_clear()


def test_texts_are_read_in_many_threads(texts: Path) -> None:
    """As kernels compile. A collector that lets others go first shows what is shared."""
    (texts / "rules/probe.cuh").write_text(GOOD * 70)

    def give_way(phase: str, info: dict[str, int]) -> None:
        time.sleep(1e-4)

    gc.callbacks.append(give_way)
    try:
        with ThreadPoolExecutor(8) as pool:
            for text in [pool.submit(_unread, RULE) for _ in range(16)]:
                assert len(text.result().statements) == 210
    finally:
        gc.callbacks.remove(give_way)


def _unread(rule: UpdateRule) -> language.RuleText:
    language._read.cache_clear()
    language._parse.cache_clear()
    return read_update_text(rule)


def read(folder: Path, text: str) -> language.RuleText:
    (folder / "rules" / "probe.cuh").write_text(text)
    return read_update_text(RULE)


def refused(folder: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(folder, text)
    return str(caught.value)


# ---- the subset ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        f"// a comment\n\n{GOOD}",
        f"{GOOD}u = u; // the last word",
        f"g = fma(beta1, p, g);\n{GOOD}",
        f"{GOOD}u = -u + 1 - 2.5e-3 * p / 4;",
        f"{GOOD}u = where(abs(p) >= beta2, sqrt(max(p, 0)), min(p, sign(g)));",
        f"t = p;\n{GOOD}u = where(t != 1, t, where(t < 2, 3, -4));",
        "exp_avg = exp_avg;\nexp_avg_sq = exp_avg_sq;\nu = g;",
    ],
)
def test_assignments_of_the_subset_are_read(texts: Path, text: str) -> None:
    found = read(texts, text)
    assert {"exp_avg", "exp_avg_sq", "u"} <= {target for target, _ in found.statements}
    assert found.path == texts / "rules" / "probe.cuh"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("u = lr * g", "'lr' is unknown"),
        ("u = later;\nlater = g", "'later' is unknown"),
        ("u = g u = p", "not a rule text"),
        ("u = step_size", "'step_size' is unknown"),
        ("u = p_norm", "'p_norm' is unknown"),
        ("u = exp(g)", "there is no function 'exp'; there are + - * / and fma(a, b, c), sqrt(a)"),
        ("u = fma(g, g)", "fma() takes 3, got 2: write fma(a, b, c)"),
        ("u = max(g)", "max() takes 2, got 1: write max(a, b)"),
        ("u = norm(g)", "there is no function 'norm'"),
        ("u = where(g)", "where() takes 3, got 1: write where(a < b, x, y)"),
        ("u = 1e400", "too large for float32"),
        ("u = -3.5e38", "too large for float32"),
        (f"u = 1{'0' * 400}", "too large for float32"),
        ("Total = g", "'Total' is no word in lower case"),
        ("STATES = g", "'STATES' is no word in lower case"),
        ("xor = g", "'xor' means something in kernels"),
        ("u = sqrt(a=g)", "'sqrt(a=g)' is not part of the rule language"),
        ("u = std.sqrt(g)", "'std.sqrt(g)' is not part of the rule language"),
        ("u = g ** 2", "'**' is not part of the rule language"),
        ("u = g @ p", "'@' is not part of the rule language"),
        ("u = g >> 2", "'>>' is not part of the rule language"),
        ("u = g % 2", "'%' is not part of the rule language"),
        ("u = g // 2", None),  # the rest is a comment
        ("u = ~g", "'~' is not part of the rule language"),
        ("u = +g", "'unary +' is not part of the rule language"),
        ("u = not g", "'not' is not part of the rule language"),
        ("u = g and p", "'and' is not part of the rule language"),
        ("u = g if p else g", "'g if p else g' is not part of the rule language"),
        ("u = g[0]", "'g[0]' is not part of the rule language"),
        ("u = g.real", "not part of the rule language"),
        ("u = (g, p)", "not part of the rule language"),
        ("u = [g]", "not part of the rule language"),
        ("u = lambda: g", "not part of the rule language"),
        ("u = (x := g)", "'(x := g)' is not part of the rule language"),
        ("u = 'g'", "not part of the rule language"),
        ("u = 1j", "not part of the rule language"),
        ("u = True", "numbers are the only constants"),
        ("u = None", "not part of the rule language"),
        ("u = g < p", "a comparison stands only as the first argument of where()"),
        ("u = where(g, p, p)", "must be one comparison"),
        ("u = where(0 < g < p, p, p)", "must be one comparison"),
        ("u = where(g < lr, p, p)", "'lr' is unknown"),
        ("u = where(g < p, lr, p)", "'lr' is unknown"),
        ("u = where(g is p, p, p)", "'is' is not part of the rule language"),
        ("u = where(g in p, p, p)", "'in' is not part of the rule language"),
        ("u += g", "only assignments"),
        ("u: float = g", "only assignments"),
        ("u = p = g", "only assignments"),
        ("u, x = g, p", "only assignments"),
        ("g[0] = p", "only assignments"),
        ("import os", "only assignments"),
        ("u", "only assignments"),
        ("if g: u = p", "only assignments"),
        ("for u in g: u = p", "only assignments"),
        ("def f(): pass", "only assignments"),
        ("del u", "only assignments"),
        ("float u = g", "not a rule text"),
        ("u = g )", "not a rule text"),
        ("u = ", "not a rule text"),
        ("{ u = g", "not a rule text"),
        ("#define u g", None),  # '#' too starts a comment: nothing of it reaches a compiler
    ],
)
def test_everything_else_is_refused_with_file_and_line(
    texts: Path, line: str, reason: str | None
) -> None:
    text = f"// first line\n{GOOD}{line};\n"
    if reason is None:
        assert len(read(texts, text).statements) in (3, 4)
        return
    message = refused(texts, text)
    assert f"{texts / 'rules' / 'probe.cuh'}:5: " in message
    assert reason in message


# ---- names ---------------------------------------------------------------------------------


def rule_of(
    states: Sequence[str] = ("kept",), scalars: Sequence[str] = (), text: str = ""
) -> UpdateRule:
    """A rule that keeps these states, and reads these scalars."""
    kept = "".join(f"{name} = {name};" for name in states)
    total = " + ".join(["g", *scalars])
    specs = tuple(StateSpec(name, signed=True) for name in states)
    return UpdateRule("probe", specs, tuple(scalars), text=f"{text}{kept} u = {total};")


@pytest.mark.parametrize("kind", ["state", "scalar"])
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        *((name, "is a scalar that every rule has") for name in language.SKELETON_SCALARS),
        *((name, "means something in kernels") for name in ("g", "p", "u", "ratio", "k", "double")),
        *((name, "is a key of every state dict") for name in EXTRA_KEYS),
        *(
            (name, "is no word in lower case")
            for name in ("CLIPS", "kStore", "a b", "_x", "lambda", "")
        ),
    ],
)
def test_a_name_that_means_something_else_is_refused(name: str, reason: str, kind: str) -> None:
    rule = rule_of(states=[name]) if kind == "state" else rule_of(scalars=[name])
    with pytest.raises(ConfigError, match=f"'probe': '{name}' {reason}; rename the {kind}"):
        read_update_text(rule)


@pytest.mark.parametrize(
    ("states", "scalars"),
    [
        (["m", "m"], []),
        (["m"], ["m"]),
        (["m"], ["beta", "beta"]),
        (["m", "m_q8"], []),
        (["m_absmax", "m"], []),
    ],
)
def test_two_things_of_one_name_are_refused(states: list[str], scalars: list[str]) -> None:
    with pytest.raises(ConfigError, match="is there already, by a"):
        read_update_text(rule_of(states, scalars))


def test_a_rule_may_have_no_states() -> None:
    text = read_update_text(UpdateRule("probe", (), (), text="u = g;"))
    assert [target for target, _ in text.statements] == ["u"]


def words_of_kernels() -> list[str]:
    """Every word that occurs in the kernels, where a name of a rule might meet it."""
    variant = KernelVariant(rule_of(["m"], ["beta"]), "float16", "bfloat16", ("map8",), 256)
    sources = cpp_source(variant) + cuda_source(variant)
    return sorted(set(re.findall(r"\b[A-Za-z_]\w*", sources)))


def usable(kind: str, words: list[str]) -> list[str]:
    """Those of the words that may be names of this kind."""
    found = []
    for word in words:
        try:
            if kind == "scalar":
                read_update_text(rule_of(scalars=[word]))
            else:
                read_update_text(rule_of(text=f"{word} = g;"))
        except ConfigError:
            continue
        found.append(word)
    return found


@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")
def test_every_word_of_the_kernels_is_refused_or_can_be_a_name(kernel_cache: Path) -> None:
    words = words_of_kernels()
    scalars, targets = usable("scalar", words), usable("target", words)
    assert min(len(scalars), len(targets)) > 100
    text = "".join(f"{word} = g + {word if word in ('g', 'p') else 1};" for word in targets)
    # Sums of all of them would be nested too deeply.
    parts = [*(rule_of(scalars=scalars[begin::2]) for begin in range(2)), rule_of(text=text)]
    for rule in parts:
        for name in ("bfloat16", "map8", "e2m1") if rule is parts[-1] else ("map8",):
            formats = (name,) * len(rule.states)
            variant = KernelVariant(rule, "float", "float", formats, 256)
            compile_library(cpp_source(variant), f"words-{name}")


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("", "exp_avg, exp_avg_sq, u"),
        ("// only words\n", "exp_avg, exp_avg_sq, u"),
        ("exp_avg = g;\nu = g;", "exp_avg_sq"),
        ("exp_avg = g;\nexp_avg_sq = g;", "u"),
    ],
)
def test_every_state_and_the_direction_must_be_assigned(
    texts: Path, text: str, missing: str
) -> None:
    message = refused(texts, text)
    assert f"must assign {missing}" in message
    assert str(texts / "rules" / "probe.cuh") in message


def test_a_rule_may_not_assign_a_scalar(texts: Path) -> None:
    # All elements share it: the kernel could not compile, and torch would run something else.
    message = refused(texts, f"beta1 = g;\n{GOOD}")
    assert "probe.cuh:1: " in message
    assert "beta1" in message


def test_a_missing_file_says_where_it_was_expected(texts: Path) -> None:
    with pytest.raises(ConfigError, match=r"rules/probe\.cuh"):
        read_update_text(RULE)
    with pytest.raises(ConfigError, match=r"trust_ratios/probe\.cuh"):
        read_trust_ratio_text(RULE)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("ratio = p_norm / u_norm * beta1;", ""),
        ("bound = p_norm;\nratio = where(bound > 0, bound, 1);", ""),
        ("ratio = g;", "'g' is unknown"),
        ("ratio = exp_avg;", "'exp_avg' is unknown"),
        ("r = p_norm;", "must assign ratio"),
    ],
)
def test_trust_ratios_read_norms_and_scalars_only(texts: Path, text: str, reason: str) -> None:
    (texts / "trust_ratios" / "probe.cuh").write_text(text)
    if not reason:
        assert read_trust_ratio_text(RULE).statements[-1][0] == "ratio"
        return
    with pytest.raises(ConfigError, match=r"probe\.cuh") as caught:
        read_trust_ratio_text(RULE)
    assert reason in str(caught.value)


# ---- the texts that ship -------------------------------------------------------------------


def test_every_rule_text_of_every_name_is_read() -> None:
    used = set()
    for name in list_optimizers():
        clip = {"trust_ratio": "clip", "compat": "bitsandbytes"}
        clips = [clip] if has_ratio(name) and not name.endswith(("16bit", "4bit", "fp8")) else []
        for stated in (*selections(name), *clips):
            rule = rule_of_name(name, **stated)
            used |= {read_update_text(part.rule).path for part in parts_of(rule)}
            if rule.trust_ratio:
                used.add(read_trust_ratio_text(rule).path)
    shipped = set(data_dir("kernels").glob("rules/*")) | set(data_dir("kernels").glob("trust_*/*"))
    assert used == shipped


def test_every_function_of_the_subset_is_defined_for_kernels() -> None:
    prelude = (data_dir("kernels") / "shared" / "prelude.cuh").read_text()
    for name, count in FUNCTIONS.items():
        definition = prelude.partition(f"OPT_FN float {name}(")[2].partition(")")[0]
        assert definition.count(",") == count - 1, name


# ---- conversions ---------------------------------------------------------------------------

needs_compiler = pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")

CONVERT = """
extern "C" {
void up_float16(const uint16_t* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = to_float(float16{from[i]});
}
void up_bfloat16(const uint16_t* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = to_float(bfloat16{from[i]});
}
void down_float16(const float* from, float16* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) store(to + i, from[i]);
}
void down_bfloat16(const float* from, bfloat16* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) store(to + i, from[i]);
}
}
"""
HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@pytest.fixture(scope="module")
def conversions(kernel_cache: Path) -> ctypes.CDLL:
    source = (
        (data_dir("kernels") / "shared" / "prelude.cuh").read_text().replace("#pragma once\n", "")
    )
    return ctypes.CDLL(str(compile_library(source + CONVERT, "conversions")))


def convert(library: ctypes.CDLL, function: str, source: Tensor, to: torch.dtype) -> Tensor:
    target = torch.empty(source.shape, dtype=to)
    getattr(library, function)(
        ctypes.c_void_p(source.data_ptr()),
        ctypes.c_void_p(target.data_ptr()),
        ctypes.c_int64(source.numel()),
    )
    return target


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    """Equal bits; of NaN only that it is one, for hardware differs in its payload."""
    integer = {2: torch.int16, 4: torch.int32}[got.element_size()]
    assert torch.equal(got.isnan(), want.isnan())
    number = ~want.isnan()
    differ = got.view(integer)[number] != want.view(integer)[number]
    assert not differ.any(), (got[number][differ][:5], want[number][differ][:5])


@needs_compiler
@pytest.mark.parametrize("name", HALVES)
def test_all_65536_patterns_are_read_as_torch_reads_them(
    conversions: ctypes.CDLL, name: str
) -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    assert patterns.unique().numel() == 65536
    got = convert(conversions, f"up_{name}", patterns, torch.float32)
    assert_same_bits(got, patterns.view(HALVES[name]).float())


def edges(dtype: torch.dtype) -> Tensor:
    """Every 16-bit value, the midpoints between neighbours, and their neighbours in float32."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    values = values[values.isfinite()].sort().values
    middles = ((values[1:].double() + values[:-1].double()) / 2).float()
    points = torch.cat([values, middles, -middles])
    around = [
        points,
        points.nextafter(torch.tensor(torch.inf)),
        points.nextafter(torch.tensor(0.0)),
    ]
    return torch.cat(around)


def patterns32() -> Tensor:
    """Random bit patterns, and those at the ends of float32's ranges."""
    generator = torch.Generator().manual_seed(0)
    any_bits = torch.randint(-(2**31), 2**31, (200_000,), generator=generator)
    special = [0, 1, 0x007FFFFF, 0x00800000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FBFFFFF,
               0x7FC00000, 0x7FFFFFFF, 0x477FEFFF, 0x477FF000, 0x477FE000, 0x33000000, 0x33000001,
               0x33800000, 0x38800000, 0x387FFFFF, 0x7F7F7FFF, 0x7F7F8000]  # fmt: skip
    edge = torch.tensor(special + [pattern - 2**31 for pattern in special])
    return torch.cat([any_bits, edge]).to(torch.int32).view(torch.float32)


@needs_compiler
@pytest.mark.parametrize("name", HALVES)
def test_stores_round_as_torch_rounds(conversions: ctypes.CDLL, name: str) -> None:
    source = torch.cat([edges(HALVES[name]), patterns32()])
    assert source.isnan().any()
    assert source.isinf().any()
    assert (source.abs() < 2**-126).any()
    got = convert(conversions, f"down_{name}", source, HALVES[name])
    assert_same_bits(got, source.to(HALVES[name]))


@needs_compiler
@pytest.mark.parametrize("name", HALVES)
def test_a_stored_nan_stays_one_and_keeps_its_sign(conversions: ctypes.CDLL, name: str) -> None:
    payloads = torch.tensor([0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0x7F80FFFF, 0x7FBF0000])
    source = torch.cat([payloads, payloads - 2**31]).to(torch.int32).view(torch.float32)
    got = convert(conversions, f"down_{name}", source, HALVES[name])
    assert got.isnan().all()
    assert torch.equal(got.view(torch.int16) < 0, source.view(torch.int32) < 0)
