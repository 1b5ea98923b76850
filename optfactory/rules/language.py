"""Update rules: what an optimizer keeps per parameter, and the text of its mathematics.

A rule text is a handful of assignments in ``kernels/rules/<name>.cuh``. It is the only place
where the mathematics of an optimizer is written: `optfactory.rules.codegen` turns it into C++ for
CPUs, CUDA for GPUs and plain torch for everything else. The subset is deliberately small, so
that each target computes the same thing: assignments of ``+ - * /``, comparisons inside
``where``, and calls of the functions in `FUNCTIONS`.
"""

from __future__ import annotations

import ast
import keyword
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from textwrap import dedent
from threading import Lock
from typing import Any, Literal

from optfactory.errors import ConfigError
from optfactory.rules.options import COMMON_SCALARS
from optfactory.rules.resources import data_dir

# Functions that rule texts may call, as one writes them; defined in kernels/shared/prelude.cuh.
_SIGNATURES = (
    *("fma(a, b, c)", "sqrt(a)", "abs(a)", "sign(a)", "max(a, b)", "min(a, b)"),
    "where(a < b, x, y)",
)
FUNCTIONS = {text.partition("(")[0]: text.count(",") + 1 for text in _SIGNATURES}

# Scalars that the kernel skeleton itself needs from every rule:
# p <- p * decay - step_size * ratio * u
SKELETON_SCALARS = ("decay", "step_size", *COMMON_SCALARS)

# Keys that an option adds to state dicts (optfactory/state/layout.py).
_STATE_KEYS = ("gnorm_vec", "compensation", "master_low", "master", "neuron_second_moment")

# What they append to a state's name for its codes and their scales.
_CODE_ENDS = ("_q8", "_absmax", "_fp8", "_scale", "_q4")

# What rule texts read and assign beside states and scalars.
_VARIABLES = ("g", "p", "u", "p_norm", "u_norm", "g_norm", "ratio")

# Names that the generated functions use themselves, and words of C++ that Python does not have.
# Names with capitals are refused altogether: the macros and types of kernels have them.
_WORDS = """
    k stay states own_ratio
    alignas alignof and_eq asm auto bitand bitor bool case catch char char16_t char32_t compl
    const const_cast constexpr decltype default delete do double dynamic_cast enum explicit export
    extern false float friend goto inline int long mutable namespace new noexcept not_eq nullptr
    operator or_eq private protected public register reinterpret_cast short signed sizeof static
    static_assert static_cast struct switch template this thread_local throw true typedef typeid
    typename typeof union unsigned using virtual void volatile wchar_t xor xor_eq
"""
_RESERVED = frozenset(_WORDS.split())

_COMPARISONS = (ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Eq, ast.NotEq)
# CPython before 3.13 counts depth for all threads together (gh-106905): two parsers at once fail.
_PARSER = Lock()

_GREATEST = 3.4028234663852886e38  # of float32, which constants become

# What is not in the language, as it is written; other expressions are shown whole.
_WRITTEN: dict[type[ast.AST], str] = {
    ast.Pow: "**",
    ast.Mod: "%",
    ast.MatMult: "@",
    ast.BitAnd: "&",
    ast.BitOr: "|",
    ast.BitXor: "^",
    ast.LShift: "<<",
    ast.RShift: ">>",
    ast.Invert: "~",
    ast.UAdd: "unary +",
    ast.Not: "not",
    ast.And: "and",
    ast.Or: "or",
    ast.Is: "is",
    ast.IsNot: "is not",
    ast.In: "in",
    ast.NotIn: "not in",
}
_LANGUAGE = f"there are + - * / and {', '.join(_SIGNATURES)}"


@dataclass(frozen=True)
class StateSpec:
    """One per-element state: its PyTorch name, whether its values can be negative, its beginning.

    `fill` is its value before the first step, not negative. Kernels do not depend on it.

    >>> StateSpec("exp_avg_sq", signed=False).name
    'exp_avg_sq'
    """

    name: str
    signed: bool
    fill: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class UpdateRule:
    """One optimizer's mathematics: the rule text, its states and its per-step scalars.

    Attributes:
        name: the stem of ``kernels/rules/<name>.cuh``, or how messages call `text`.
        states: per-element states in the order in which kernels see them.
        scalars: names of the float32 scalars the text reads; computed on the host in float64.
        trust_ratio: the stem of ``kernels/trust_ratios/<name>.cuh``, or None. A rule with a
            trust ratio runs in two passes: statistics (norms), then update.
        ratio_of: whose norm the trust ratio compares with that of the parameter. ``u`` is the
            direction, whose step the ratio scales; another name that the text assigns stands for
            the direction. ``g`` is the gradient as the rule gets it: the ratio is known before
            the rule runs, whose text reads ``ratio`` and scales by it what it wants to.
        transform: ``orthogonalize`` if the direction is made of whole matrices: u is made
            orthogonal by `optfactory.matrix`, as the group's fields say
            (`optfactory.optimizers.matrices`), before the step; None if u is the direction.
        text: the rule text itself; None where it is the file.

    >>> states = (StateSpec("momentum_buffer", signed=True),)
    >>> text = "momentum_buffer = fma(momentum, momentum_buffer, g); u = momentum_buffer;"
    >>> rule = UpdateRule("sgd", states, ("momentum",), text=text)
    >>> rule.all_scalars
    ('decay', 'step_size', 'step', 'step_high', 'seed', 'percentile', 'momentum')
    """

    name: str
    states: tuple[StateSpec, ...]
    scalars: tuple[str, ...]
    trust_ratio: str | None = None
    ratio_of: str = "u"
    transform: Literal["orthogonalize"] | None = None
    text: str | None = None

    @property
    def all_scalars(self) -> tuple[str, ...]:
        """The skeleton's scalars followed by the rule's own, in the kernels' order."""
        return SKELETON_SCALARS + self.scalars


@dataclass(frozen=True)
class RuleText:
    """A checked rule text: its file and its assignments in order."""

    path: Path
    statements: tuple[tuple[str, ast.expr], ...]


def read_update_text(rule: UpdateRule) -> RuleText:
    """Read and check ``kernels/rules/<rule.name>.cuh``, or the rule's own text.

    The text may read the states, the scalars, the gradient ``g`` and the parameter ``p``, and
    ``ratio`` if that is of the gradient; it must assign every state and the update direction ``u``.

    Raises:
        ConfigError: a state or scalar has a name that means something else; the file is missing or
            leaves the subset, and the message names file and line.
    """
    states = tuple(state.name for state in rule.states)
    _check_names(rule.name, states, rule.scalars)
    inputs, outputs = ("g", "p", *states, *rule.scalars), (*states, "u")
    if rule.trust_ratio is None and rule.ratio_of != "u":
        raise ConfigError(
            f"the rule '{rule.name}' says what its ratio is of, and has no trust_ratio"
        )
    if rule.ratio_of == "g":
        inputs += ("ratio",)
    elif rule.ratio_of != "u":
        outputs += (rule.ratio_of,)
    if rule.text is not None:
        return _parse(Path(f"<rule text of {rule.name}>"), rule.text, inputs, outputs)
    return _read(f"rules/{rule.name}.cuh", inputs, outputs)


def _check_names(rule: str, states: tuple[str, ...], scalars: tuple[str, ...]) -> None:
    """Refuse names that kernels, state dicts or the rule itself use for something else."""
    taken = dict.fromkeys((*_RESERVED, *_VARIABLES), "means something in kernels")
    taken |= dict.fromkeys(SKELETON_SCALARS, "is a scalar that every rule has")
    taken |= dict.fromkeys(_STATE_KEYS, "is a key of every state dict")
    for kind, names in (("state", states), ("scalar", scalars)):
        for name in names:
            ends = ("", *_CODE_ENDS) if kind == "state" else ("",)
            stored = [f"{name}{end}" for end in ends]
            reason = next((taken[key] for key in stored if key in taken), "")
            if reason or not _is_name(name):
                reason = reason or "is no word in lower case"
                raise ConfigError(f"the rule '{rule}': '{name}' {reason}; rename the {kind}")
            taken |= dict.fromkeys(stored, f"is there already, by a {kind}")


def _is_name(name: str) -> bool:
    return bool(re.fullmatch(r"[a-z][a-z0-9_]*", name)) and not keyword.iskeyword(name)


def read_trust_ratio_text(rule: UpdateRule) -> RuleText:
    """Read and check ``kernels/trust_ratios/<rule.trust_ratio>.cuh``.

    The text may read ``p_norm``, ``u_norm`` (``g_norm`` if the ratio is of the gradient) and the
    rule's scalars and must assign ``ratio``.
    """
    path = f"trust_ratios/{rule.trust_ratio}.cuh"
    return _read(path, (*norms_of(rule), *rule.scalars), ("ratio",))


def norms_of(rule: UpdateRule) -> tuple[str, str]:
    """What trust ratios call the norms that they compare."""
    return ("p_norm", "g_norm" if rule.ratio_of == "g" else "u_norm")


@cache
def _read(relative: str, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> RuleText:
    path = data_dir("kernels") / relative
    if not path.is_file():
        raise ConfigError(f"the rule text '{relative}' does not exist; expected it at {path}")
    return _parse(path, path.read_text(encoding="utf-8"), inputs, outputs)


@cache
def _parse(path: Path, text: str, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> RuleText:
    # With '#' for '//' the text is valid Python, at the same line numbers.
    source = dedent(text).replace("//", "#")
    try:
        with _PARSER:
            module = ast.parse(source, filename=str(path))
    except SyntaxError as error:
        raise ConfigError(f"{path}:{error.lineno}: not a rule text: {error.msg}") from error
    known = set(inputs)
    statements: list[tuple[str, ast.expr]] = []
    for node in module.body:
        if not (
            isinstance(node, ast.Assign)
            and len(node.targets) == 1
            and isinstance(node.targets[0], ast.Name)
        ):
            raise _refused(path, node, "only assignments `name = expression` are allowed")
        _check(path, node.value, known)
        target = node.targets[0].id
        if target in inputs and target not in outputs and target != "g":
            raise _refused(path, node, f"'{target}' may be read only")
        if target in _RESERVED:
            raise _refused(
                path, node, f"'{target}' means something in kernels; choose another name"
            )
        if not _is_name(target):
            raise _refused(path, node, f"'{target}' is no word in lower case; rename it")
        known.add(target)
        statements.append((target, node.value))
    missing = [name for name in outputs if name not in {target for target, _ in statements}]
    if missing:
        raise ConfigError(f"{path}: the text must assign {', '.join(missing)}")
    return RuleText(path, tuple(statements))


def _check(path: Path, node: ast.expr, known: set[str]) -> None:
    """Refuse every expression outside the subset of rule texts."""
    match node:
        case ast.Constant(value=bool()):
            raise _refused(path, node, "numbers are the only constants allowed")
        case ast.Constant(value=int() | float() as value):
            if abs(value) > _GREATEST:
                raise _refused(path, node, "the number is too large for float32")
        case ast.Name(id=name):
            if name not in known:
                raise _refused(path, node, f"'{name}' is unknown; known are {sorted(known)}")
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            _check(path, operand, known)
        case ast.BinOp(op=ast.Add() | ast.Sub() | ast.Mult() | ast.Div(), left=left, right=right):
            _check(path, left, known)
            _check(path, right, known)
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]):
            _check_call(path, node, name, arguments, known)
        case ast.Compare():
            raise _refused(path, node, "a comparison stands only as the first argument of where()")
        case _:
            raise _foreign(path, node)


def _check_call(
    path: Path, node: ast.expr, name: str, arguments: list[ast.expr], known: set[str]
) -> None:
    if name not in FUNCTIONS:
        raise _refused(path, node, f"there is no function '{name}'; {_LANGUAGE}")
    if FUNCTIONS[name] != len(arguments):
        signature = next(text for text in _SIGNATURES if text.startswith(f"{name}("))
        reason = f"{name}() takes {FUNCTIONS[name]}, got {len(arguments)}: write {signature}"
        raise _refused(path, node, reason)
    if name == "where":
        _check_condition(path, arguments[0], known)
        arguments = arguments[1:]
    for argument in arguments:
        _check(path, argument, known)


def _check_condition(path: Path, node: ast.expr, known: set[str]) -> None:
    """Accept exactly one comparison, the first argument of ``where``."""
    if not isinstance(node, ast.Compare) or len(node.ops) != 1:
        raise _refused(path, node, "the first argument of where() must be one comparison")
    if not isinstance(node.ops[0], _COMPARISONS):
        raise _foreign(path, node)
    _check(path, node.left, known)
    _check(path, node.comparators[0], known)


def _foreign(path: Path, node: ast.expr) -> ConfigError:
    """The error for an expression of Python that rule texts do not have."""
    operator: Any = getattr(node, "op", None) or next(iter(getattr(node, "ops", ())), None)
    written = _WRITTEN[type(operator)] if type(operator) in _WRITTEN else ast.unparse(node)
    return _refused(path, node, f"'{written}' is not part of the rule language; {_LANGUAGE}")


def _refused(path: Path, node: ast.AST, reason: str) -> ConfigError:
    return ConfigError(f"{path}:{getattr(node, 'lineno', 0)}: {reason}")
