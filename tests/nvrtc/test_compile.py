"""Every CUDA kernel variant compiles for every supported generation, with few registers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from optfactory import get_optimizer_info, list_optimizers, resolve
from optfactory.backends.cuda.nvrtc import COMPILE_OPTIONS, compile_cubin
from optfactory.backends.cuda.tables import UNQUANTIZED_BLOCK
from optfactory.config.schema import OptimizerConfig
from optfactory.errors import ConfigError, KernelCompileError
from optfactory.rules.codegen import CUDA_THREADS, KernelVariant, cuda_source, cuda_tables_source
from optfactory.rules.language import UpdateRule
from optfactory.rules.options import KernelOptions
from optfactory.rules.parts import parts_of
from optfactory.rules.resources import data_dir
from optfactory.state.codecs import BFLOAT16, EIGHT_BIT, FLOAT32, FOUR_BIT, FP8, Codec
from tests.families import few_values, selections
from tests.nvrtc.compile import ARCHITECTURES, Usage, needs_nvrtc, usage_of

pytestmark = [needs_nvrtc, pytest.mark.slow]

DTYPES = ("float", "float16", "bfloat16")
BLOCK_SIZES = (64, 128, 512, 1024, 2048, 4096)  # and 256, which all variants are compiled with
APART = ("is_paged", "optim_bits", "block_size")  # fields on which no rule depends
REGISTERS = 64  # of a thread: two blocks of 512 share a multiprocessor's 65536
# Bytes of a thread in local memory. What the slow ways (strided views, divisions of extreme
# numbers) keep across a call lies there; arrays outside of registers would take hundreds.
LOCAL_BYTES = 128


# ---- what the helper reports -------------------------------------------------------------------

TOY = """
extern "C" __global__ void __launch_bounds__(512, 2) plain(float* p, float a) {
  __shared__ float s[512];
  s[threadIdx.x] = p[threadIdx.x];
  __syncthreads();
  p[threadIdx.x] += a * s[threadIdx.x ^ 1];
}
extern "C" __global__ void indexed(float* p, int j) {
  float b[64];
  for (int i = 0; i < 64; ++i) b[i] = p[i];
  b[j & 63] = 3.0f;
  float sum = 0.0f;
  for (int i = 0; i < 64; ++i) sum += b[(i * j) & 63];
  p[0] = sum;
}
extern "C" __global__ void __launch_bounds__(1024) crowded(float* p) {
  float b[96];
#pragma unroll
  for (int i = 0; i < 96; ++i) b[i] = p[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 96; ++i) p[i * 1024 + threadIdx.x] = b[i] * b[i * 7 % 96];
}
"""


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_report_tells_registers_spills_and_local_memory(architecture: str) -> None:
    found = usage_of(TOY, "toy", architecture)
    assert set(found) == {"plain", "indexed", "crowded"}
    plain = found["plain"]
    assert plain == Usage(plain.registers, 0, 0, 0, 2048)
    assert 0 < plain.registers <= 64
    assert found["indexed"].stack_frame >= 256
    assert found["crowded"].registers == 64
    assert min(found["crowded"].spill_stores, found["crowded"].spill_loads) > 0


def test_products_are_not_contracted_and_subnormal_numbers_stay() -> None:
    from cupy.cuda import nvrtc

    source = 'extern "C" __global__ void f(float* p, float a) { p[0] = p[0] * a + p[1] / a; }'
    program = nvrtc.createProgram(source, "probe.cu", (), ())
    nvrtc.compileProgram(program, (*COMPILE_OPTIONS, "-arch=sm_80"))
    assembly = nvrtc.getPTX(program).decode()
    nvrtc.destroyProgram(program)
    assert "mul.rn.f32" in assembly
    assert "div.rn.f32" in assembly
    assert "fma" not in assembly
    assert "ftz" not in assembly


def test_a_refused_source_is_an_error_with_the_compilers_words() -> None:
    with pytest.raises(KernelCompileError) as caught:
        compile_cubin("__global__ void f() { undeclared(); }", "probe", "sm_90")
    message = str(caught.value)
    assert "probe for sm_90" in message
    assert 'identifier "undeclared" is undefined' in message
    assert "OPTFACTORY_BACKEND=reference" in message


# ---- the kernels -------------------------------------------------------------------------------


CODECS = (FLOAT32, BFLOAT16, EIGHT_BIT, FP8, FOUR_BIT)
FORMATS = {FP8: "fp8"}


@cache
def rules() -> list[tuple[UpdateRule, Codec]]:
    """Every update rule that a config can ask for, with each width of its state."""
    return list(dict.fromkeys(_rules()))


def _rules() -> Iterator[tuple[UpdateRule, Codec]]:
    infos = [get_optimizer_info(name) for name in list_optimizers()]
    for info in infos:
        if info.name != info.family:
            continue
        deciding = {field for asked in selections(info.name) for field in asked}
        # What all families have says how kernels treat elements, not which rule they run.
        own = info.config_class.model_fields.keys() - OptimizerConfig.model_fields.keys()
        fields = {key: info.config_class.model_fields[key] for key in sorted(own)}
        few = {
            field: few_values(info.name, field)
            for field in fields
            if field not in APART and (field in deciding or fields[field].annotation is not float)
        }
        few = {field: values for field, values in few.items() if values}
        # bitsandbytes' norms may be of something else, of which there is then a rule.
        compats = ("none", "bitsandbytes") if "trust_ratio" in own else ("none",)
        for stated, codec, compat in itertools.product(threes_of(few), CODECS, compats):
            width = {"optim_bits": codec.bits, "state_format": FORMATS.get(codec, "dynamic")}
            try:
                config = resolve(info.name, **stated, **width, compat=compat)
            except ConfigError:
                continue  # such as AMSGrad at 8 bits
            for part in parts_of(config.rule(config.model_dump())):
                yield part.rule, codec if part.rule.states else FLOAT32


def threes_of(few: dict[str, tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """All values of each three fields; those of all fields together are hundreds of thousands."""
    for names in itertools.combinations(few, min(3, len(few))):
        for values in itertools.product(*(few[name] for name in names)):
            yield dict(zip(names, values, strict=True))


def variant(
    rule: UpdateRule, codec: Codec, parameter: str, gradient: str, block_size: int = 256
) -> KernelVariant:
    block_size = block_size if codec.scaled else UNQUANTIZED_BLOCK
    formats = tuple(codec.formats[state.signed] for state in rule.states)
    options = KernelOptions(random_floats=codec.always_random)
    return KernelVariant(rule, parameter, gradient, formats, block_size, options)


def variants() -> Iterator[Any]:
    """Equal dtypes for every generation; the rest, whose code differs little, for one."""
    found: dict[tuple[KernelVariant, str], None] = {}
    for rule, codec in rules():
        for parameter, gradient in itertools.product(DTYPES, DTYPES):
            if gradient not in (parameter, "float"):
                continue
            one = variant(rule, codec, parameter, gradient)
            for architecture in ARCHITECTURES if parameter == gradient else ("sm_80",):
                found[one, architecture] = None
        if codec.scaled:
            for block_size in BLOCK_SIZES:
                found[variant(rule, codec, "bfloat16", "bfloat16", block_size), "sm_80"] = None
    for one, architecture in found:
        ratio = f"-{one.rule.trust_ratio}" if one.rule.trust_ratio else ""
        name = f"{one.label}-{one.block_size}{ratio}-{architecture}"
        yield pytest.param(one, architecture, id=name)


def assert_in_registers(found: dict[str, Usage], most: int = LOCAL_BYTES) -> None:
    for kernel, usage in found.items():
        assert usage.registers <= REGISTERS, f"{kernel}: {usage}"
        local = (usage.stack_frame, usage.spill_stores, usage.spill_loads)
        assert max(local) <= most, f"{kernel} uses much local memory: {usage}"


@pytest.mark.parametrize(("one", "architecture"), list(variants()))
def test_a_kernel_compiles_with_few_registers(one: KernelVariant, architecture: str) -> None:
    found = usage_of(cuda_source(one), one.label, architecture)
    assert "optfactory_update" in found
    for kernel in ("optfactory_gather", "optfactory_finalize"):
        assert (kernel in found) == (one.rule.trust_ratio is not None)
    reads = one.rule.ratio_of == "g"
    assert ("optfactory_norms" in found) == reads
    assert ("optfactory_statistics" in found) == (one.rule.trust_ratio is not None and not reads)
    assert_in_registers(found)


OPTIONS = {
    "tensor-wise": KernelOptions(tensor_wise=True),
    "cut": KernelOptions(cuts_blocks=True),
    "cut-stochastic": KernelOptions(cuts_blocks=True, rounding="stochastic"),
    "random-codes": KernelOptions(random_codes=True),
    "cautious": KernelOptions(cautious=True, cautious_decay=True),
    "cautious-whole": KernelOptions(cautious=True, tensor_wise=True),
    "cut-kahan": KernelOptions(cuts_blocks=True, rounding="kahan"),
    "split": KernelOptions(rounding="split"),
    "cut-master": KernelOptions(cuts_blocks=True, rounding="fp32"),
    "cut-compat": KernelOptions(
        cuts_blocks=True, bitsandbytes=True, nonfinite="reset", floors=False
    ),
}


def scales_first() -> Iterator[Any]:
    """Each rule with each of the options, for all generations where blocks are cut."""
    found = [(name, "sm_80") for name in OPTIONS if name != "cut"]
    found += [("cut", name) for name in ARCHITECTURES]
    for (label, architecture), (rule, codec) in itertools.product(found, rules()):
        signed = any(state.signed for state in rule.states)
        idle = "cautious" in label and (rule.ratio_of == "g" or not signed)
        if codec.scaled and not idle:
            name = f"{label}-{rule.name}-{rule.trust_ratio}-{architecture}"
            yield pytest.param(rule, label, architecture, id=name)


@pytest.mark.parametrize(("rule", "label", "architecture"), list(scales_first()))
def test_kernels_with_options_compile(rule: UpdateRule, label: str, architecture: str) -> None:
    one = replace(variant(rule, EIGHT_BIT, "bfloat16", "bfloat16"), options=OPTIONS[label])
    found = usage_of(cuda_source(one), one.label, architecture)
    if one.options.scales_first:
        assert {"optfactory_statistics", "optfactory_update", "optfactory_commit"} <= found.keys()
    # Three and four states of eight elements, and two values for each, are more than all registers:
    # AdEMAMix's kernels with random codes spill 192 bytes, Adan's 368.
    assert_in_registers(found, LOCAL_BYTES * max(1, len(rule.states) - 1))


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_kernels_of_cut_blocks_of_all_sizes_compile(block_size: int) -> None:
    rule = next(rule for rule, codec in rules() if codec.scaled and rule.trust_ratio)
    one = variant(rule, EIGHT_BIT, "bfloat16", "bfloat16", block_size)
    one = replace(one, options=OPTIONS["cut"])
    assert_in_registers(usage_of(cuda_source(one), one.label, "sm_80"))


MAPS = {
    "lines": (KernelOptions(), 0, 4096),
    "symmetric": (KernelOptions(symmetric_map=True), 16384, 32768),
    "tables": (KernelOptions(bitsandbytes=True, nonfinite="reset", floors=False), 32768, 49152),
}


@pytest.mark.parametrize("kind", MAPS)
def test_only_maps_by_tables_take_much_shared_memory(kind: str) -> None:
    options, least, most = MAPS[kind]
    rule = next(rule for rule, codec in rules() if codec.scaled)
    one = replace(variant(rule, EIGHT_BIT, "float", "float"), options=options)
    found = usage_of(cuda_source(one), one.label, "sm_80")
    assert least <= found["optfactory_update"].shared_memory < most


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_kernels_that_write_tables_compile(architecture: str) -> None:
    assert_in_registers(usage_of(cuda_tables_source(), "tables", architecture))


def test_every_rule_is_among_the_variants() -> None:
    found = {rule.name for rule, _ in rules()}
    texts = {path.stem for path in (data_dir("kernels") / "rules").glob("*.cuh")}
    assert found == texts
    assert {rule.trust_ratio for rule, _ in rules()} >= {None, "lamb", "clip"}
    assert CUDA_THREADS * 2 * REGISTERS == 65536
