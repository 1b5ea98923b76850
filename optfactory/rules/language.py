"""Update rules: what an optimizer keeps per parameter, and the text of its mathematics.

A rule text is a handful of assignments in ``kernels/rules/<name>.cuh``. It is the only place
where the mathematics of an optimizer is written: `optfactory.rules.codegen` turns it into C++ for
CPUs, CUDA for GPUs and plain torch for everything else. The subset is deliberately small, so
that each target computes the same thing: assignments of ``+ - * /``, comparisons inside
``where``, and calls of the functions in `FUNCTIONS`.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from textwrap import dedent

from optfactory.errors import ConfigError
from optfactory.rules.options import COMMON_SCALARS
from optfactory.rules.resources import data_dir

# Functions that rule texts may call, with their number of arguments; defined in
# kernels/shared/prelude.cuh.
FUNCTIONS = {"fma": 3, "sqrt": 1, "abs": 1, "sign": 1, "max": 2, "min": 2, "where": 3}

# Scalars that the kernel skeleton itself needs from every rule:
# p <- p * decay - step_size * ratio * u
SKELETON_SCALARS = ("decay", "step_size", *COMMON_SCALARS)


# Names that the generated functions use themselves, and words of C++ that Python does not have.
_WORDS = """
    F K Kind Scalars k stay states
    asm auto bool case catch char const constexpr default delete do double enum explicit extern
    float friend goto inline int long mutable namespace new nullptr operator private protected
    public register short signed sizeof static struct switch template this throw typedef typename
    union unsigned using virtual void volatile
"""
_RESERVED = frozenset(_WORDS.split())

_COMPARISONS = (ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Eq, ast.NotEq)


@dataclass(frozen=True)
class StateSpec:
    """One per-element state: its PyTorch name, and whether its values can be negative.

    >>> StateSpec("exp_avg_sq", signed=False).name
    'exp_avg_sq'
    """

    name: str
    signed: bool


@dataclass(frozen=True)
class UpdateRule:
    """One optimizer's mathematics: the rule text, its states and its per-step scalars.

    Attributes:
        name: the stem of ``kernels/rules/<name>.cuh``, or how messages call `text`.
        states: per-element states in the order in which kernels see them.
        scalars: names of the float32 scalars the text reads; computed on the host in float64.
        trust_ratio: the stem of ``kernels/trust_ratios/<name>.cuh``, or None. A rule with a
            trust ratio runs in two passes: statistics (norms), then update.
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

    The text may read the states, the scalars, the gradient ``g`` and the parameter ``p``; it
    must assign every state and the update direction ``u``.

    Raises:
        ConfigError: the file is missing or leaves the subset; the message names file and line.
    """
    states = tuple(state.name for state in rule.states)
    inputs, outputs = ("g", "p", *states, *rule.scalars), (*states, "u")
    if rule.text is not None:
        return _parse(Path(f"<rule text of {rule.name}>"), rule.text, inputs, outputs)
    return _read(f"rules/{rule.name}.cuh", inputs, outputs)


def read_trust_ratio_text(rule: UpdateRule) -> RuleText:
    """Read and check ``kernels/trust_ratios/<rule.trust_ratio>.cuh``.

    The text may read ``p_norm``, ``u_norm`` and the rule's scalars and must assign ``ratio``.
    """
    path = f"trust_ratios/{rule.trust_ratio}.cuh"
    return _read(path, ("p_norm", "u_norm", *rule.scalars), ("ratio",))


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
    reserved = _RESERVED.intersection(inputs)
    if reserved:
        raise ConfigError(f"{path}: states and scalars cannot be called {sorted(reserved)}")
    try:
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
        case ast.Constant(value=int() | float()):
            return
        case ast.Name(id=name):
            if name not in known:
                raise _refused(path, node, f"'{name}' is unknown; known are {sorted(known)}")
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            _check(path, operand, known)
        case ast.BinOp(op=ast.Add() | ast.Sub() | ast.Mult() | ast.Div(), left=left, right=right):
            _check(path, left, known)
            _check(path, right, known)
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]):
            if FUNCTIONS.get(name) != len(arguments):
                raise _refused(path, node, f"no function '{name}' of {len(arguments)} arguments")
            if name == "where":
                _check_condition(path, arguments[0], known)
                arguments = arguments[1:]
            for argument in arguments:
                _check(path, argument, known)
        case _:
            raise _refused(path, node, f"{type(node).__name__} is not part of the rule language")


def _check_condition(path: Path, node: ast.expr, known: set[str]) -> None:
    """Accept exactly one comparison, the first argument of ``where``."""
    if not isinstance(node, ast.Compare) or len(node.ops) != 1:
        raise _refused(path, node, "the first argument of where() must be one comparison")
    if not isinstance(node.ops[0], _COMPARISONS):
        name = type(node.ops[0]).__name__
        raise _refused(path, node, f"{name} is not part of the rule language")
    _check(path, node.left, known)
    _check(path, node.comparators[0], known)


def _refused(path: Path, node: ast.AST, reason: str) -> ConfigError:
    return ConfigError(f"{path}:{getattr(node, 'lineno', 0)}: {reason}")
