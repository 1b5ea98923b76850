"""From one rule text to the source of each target: C++ for CPUs, CUDA for GPUs.

Code is generated from the checked syntax tree rather than pasted, so that a constant is a float32
on every target and the order of operations is exactly the one written.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

from optfactory.rules.language import (
    RuleText,
    UpdateRule,
    norms_of,
    read_trust_ratio_text,
    read_update_text,
)
from optfactory.rules.options import KernelOptions, has_scales
from optfactory.rules.resources import data_dir

# The operators of rule texts, as C++ writes them.
_OPERATORS: dict[type[ast.AST], str] = {
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.Div: "/",
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.Eq: "==",
    ast.NotEq: "!=",
}


# The formats of kernels/shared/formats.cuh.
_FORMATS = {
    "float32": "kFloat32",
    "bfloat16": "kBfloat16",
    "map8": "kMap8",
    "e4m3": "kE4m3",
    "e5m3": "kE5m3",
    "e2m1": "kE2m1",
    "e3m1": "kE3m1",
}


# The widths that labels call them by; others have 4 bits.
_WIDTHS = {"float32": "32bit", "bfloat16": "16bit", "map8": "8bit", "e4m3": "fp8", "e5m3": "fp8"}


def dtype_name(dtype: object) -> str:
    """How kernels call a torch.dtype; the 16-bit floats are structs of the prelude."""
    return {"float32": "float"}.get(name := str(dtype).removeprefix("torch."), name)


@dataclass(frozen=True)
class KernelVariant:
    """What one compiled kernel is specialized for.

    Attributes:
        rule: the update rule.
        parameter, gradient: dtypes as C++ names: ``float``, ``float16`` or ``bfloat16``.
        formats: how each of the states is stored; see kernels/shared/formats.cuh.
        block_size: elements that share a scale, and the unit of work.
        options: what the kernel does around the rule.
    """

    rule: UpdateRule
    parameter: str
    gradient: str
    formats: tuple[str, ...]
    block_size: int
    options: KernelOptions = field(default_factory=KernelOptions)

    @property
    def label(self) -> str:
        """A short name for file names and messages."""
        widths = [_WIDTHS.get(name, "4bit") for name in self.formats] or ["32bit"]
        stored = "+".join(dict.fromkeys(widths))
        return f"{self.rule.name}-{self.parameter}-{self.gradient}-{stored}"

    @property
    def quantized(self) -> bool:
        """Whether there are states that are codes of blocks which share scales."""
        return has_scales(self.formats)


def cpp_source(variant: KernelVariant) -> str:
    """The complete source of one CPU kernel variant; compiles as C++17 on its own."""
    return "\n".join(
        [
            *_texts("shared/prelude.cuh", "cpu/lanes.h", "cpu/lookup.h", "cpu/convert.h"),
            *_texts("shared/formats.cuh"),
            specialization(variant),
            *_texts("shared/scaling.cuh", "shared/element.cuh", "shared/master.cuh"),
            *_texts("cpu/codec.h", "cpu/random_codes.h", "cpu/formats.h", "cpu/tables.h"),
            *_texts("cpu/master.h", "cpu/blocks.h", "cpu/statistics.h", "cpu/update.cpp"),
        ]
    )


def _texts(*names: str) -> list[str]:
    """Files of kernels/."""
    texts = [(data_dir("kernels") / name).read_text(encoding="utf-8") for name in names]
    return [text.replace("#pragma once\n", "") for text in texts]


# Threads of a block in CUDA kernels; at two blocks a multiprocessor each thread has 64 registers.
CUDA_THREADS = 512


def cuda_source(variant: KernelVariant) -> str:
    """The complete source of one CUDA kernel variant; compiles with NVRTC without any header.

    All text is pasted into one string because CuPy keys its cache on it.
    """
    return "\n".join(
        [
            *_texts("shared/prelude.cuh", "shared/formats.cuh"),
            f"#define THREADS {CUDA_THREADS}",
            specialization(variant),
            *_texts("shared/scaling.cuh", "shared/element.cuh", "shared/master.cuh"),
            *_texts("cuda/memory.cuh", "cuda/maps.cuh", "cuda/codec.cuh"),
            *_texts("cuda/tables.cuh", "cuda/elements.cuh", "cuda/update.cu"),
        ]
    )


def cuda_tables_source() -> str:
    """The source of the kernels that write the CUDA backend's tables; no variants of it."""
    return "\n".join(
        [
            *_texts("shared/prelude.cuh"),
            f"#define THREADS {CUDA_THREADS}",
            *_texts("cuda/write_tables.cu"),
        ]
    )


@cache
def specialization(variant: KernelVariant) -> str:
    """The part between prelude and skeleton: macros, state and scalar structs, the rule."""
    rule = variant.rule
    signed = ", ".join("true" if state.signed else "false" for state in rule.states)
    stored = ", ".join(_FORMATS[name] for name in variant.formats)
    mapped = [
        state.signed
        for state, name in zip(rule.states, variant.formats, strict=True)
        if name == "map8"
    ]
    lines = [
        f"#define PARAM {variant.parameter}",
        f"#define GRAD {variant.gradient}",
        f"#define STATES {len(rule.states)}",
        f"#define SLOTS {max(1, len(rule.states))}",  # no array may be empty
        f"#define BLOCK {variant.block_size}",
        f"#define QUANTIZED {int(variant.quantized)}",
        f"#define ANY_SHORT_FLOAT {int(not set(variant.formats) <= {'float32', 'map8'})}",
        f"#define ANY_HALF_BYTE {int(bool({'e2m1', 'e3m1'} & set(variant.formats)))}",
        f"#define TRUST_RATIO {int(rule.trust_ratio is not None)}",
        f"#define RATIO_OF_GRADIENT {int(rule.ratio_of == 'g')}",
        f"#define ANY_SIGNED {int(True in mapped)}",
        f"#define ANY_UNSIGNED {int(False in mapped)}",
        *(f"#define {name} {int(value)}" for name, value in _switches(variant.options).items()),
        f"constexpr Format kFormats[SLOTS] = {{{stored}}};",
        f"constexpr bool kSigned[SLOTS] = {{{signed}}};",
        f"struct Scalars {{ float {', '.join(rule.all_scalars)}; }};",
        *_update_function(variant),
        *_trust_ratio_function(rule),
    ]
    return "\n".join(lines) + "\n"


def _switches(options: KernelOptions) -> dict[str, bool]:
    """The macros of kernels/shared/element.cuh."""
    return {
        "MAXIMIZES": options.maximizes,
        "CLIPS": options.clips,
        "SKIPS_ZEROS": options.skips_zeros,
        "KEEPS_NONFINITE": options.nonfinite == "keep",
        "RESETS_NONFINITE": options.nonfinite == "reset",
        "STOCHASTIC": options.rounding == "stochastic",
        "RANDOM_CODES": options.random_codes,
        "KAHAN": options.rounding == "kahan",
        "SPLIT": options.rounding == "split",
        "MASTER": options.rounding == "fp32",
        "TENSOR_WISE": options.tensor_wise,
        "FLOORS": options.floors,
        "BITSANDBYTES": options.bitsandbytes,
        "CUTS_BLOCKS": options.cuts_blocks,
        "CAUTIOUS": options.cautious,
        "CAUTIOUS_DECAY": options.cautious_decay,
        "COMPUTES_SIGNED": options.map_kind == "lines",
        "COMPUTES_UNSIGNED": options.map_kind != "table",
    }


def _update_function(variant: KernelVariant) -> list[str]:
    """The rule on one element, or on a vector of them: changes its states if asked to, returns u.

    Where a trust ratio's norm is taken (kMeasures), it returns what that is of. An element that
    stays out of the step keeps the states it had, or gets zeros.
    """
    rule = variant.rule
    names = [state.name for state in rule.states]
    known = {name: name for name in ("p", "g", *names)}
    scalars = {name: f"K::splat(k.{name})" for name in rule.scalars}
    measured = "u"
    if rule.ratio_of == "g":
        scalars["ratio"] = "K::splat(own_ratio)"
    else:
        measured = rule.ratio_of
    zero = "K::splat(0.0f)"
    return [
        "template <bool kStore, bool kMeasures, class F>",
        "OPT_FN F update_rule(F p, F g, typename Kind<F>::Mask stay, F* states, float own_ratio,",
        "                     const Scalars& k) {",
        "  using K = Kind<F>;",
        *(f"  F {name} = states[{j}];" for j, name in enumerate(names)),
        *_cpp_statements(read_update_text(rule), known | scalars),
        "  if (kStore) {",
        *(
            f"    {name} = rule::where(stay, RESETS_NONFINITE ? {zero} : states[{j}], {name});"
            for j, name in enumerate(names)
        ),
        *(f"    states[{j}] = {name};" for j, name in enumerate(names)),
        "  }",
        f"  return kMeasures ? {measured} : u;",
        "}",
    ]


def _trust_ratio_function(rule: UpdateRule) -> list[str]:
    if rule.trust_ratio is None:
        return []
    text = read_trust_ratio_text(rule)
    norms = norms_of(rule)
    known = {name: name for name in norms}
    return [
        f"OPT_FN float trust_ratio(float {norms[0]}, float {norms[1]}, const Scalars& k) {{",
        "  using F = float;",
        "  using K = Kind<F>;",
        *_cpp_statements(text, known | {name: f"K::splat(k.{name})" for name in rule.scalars}),
        "  return ratio;",
        "}",
    ]


def _cpp_statements(text: RuleText, names: dict[str, str]) -> list[str]:
    lines = []
    for target, expression in text.statements:
        value = _cpp(expression, names)
        declaration = "" if target in names else "F "
        names = {**names, target: names.get(target, target)}
        lines.append(f"  {declaration}{names[target]} = {value};")
    return lines


def _cpp(node: ast.AST, names: Mapping[str, str]) -> str:
    match node:
        case ast.Constant(value=int() | float() as value):
            return f"K::splat({float(value)!r}f)"
        case ast.Name(id=name):
            return names[name]
        case ast.UnaryOp(operand=operand):
            return f"(-{_cpp(operand, names)})"
        case (
            ast.BinOp(left=left, op=op, right=right)
            | ast.Compare(left=left, ops=[op], comparators=[right])
        ):
            return f"({_cpp(left, names)} {_OPERATORS[type(op)]} {_cpp(right, names)})"
        case ast.Call(func=ast.Name(id=name), args=arguments):
            return f"rule::{name}({', '.join(_cpp(argument, names) for argument in arguments)})"
    raise AssertionError(f"unchecked expression {ast.dump(node)}")
