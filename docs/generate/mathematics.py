"""A rule text as LaTeX, line by line, in the names that state dicts and configs have."""

from __future__ import annotations

import ast
import re
from typing import TypeGuard

from optfactory.rules.language import RuleText

_SYMBOLS = {
    "g": "g",
    "p": "p",
    "u": "u",
    "r": "r",
    "p_norm": r"\lVert p \rVert",
    "u_norm": r"\lVert u \rVert",
    "g_norm": r"\lVert g \rVert",
    "eps": r"\varepsilon",
    "eps_hat": r"\hat{\varepsilon}",
}
_GREEK = ("alpha", "beta", "gamma", "mu", "nu")
_COMPARISONS: dict[type[ast.cmpop], str] = {
    ast.Lt: "<",
    ast.LtE: r"\le",
    ast.Gt: ">",
    ast.GtE: r"\ge",
    ast.Eq: "=",
    ast.NotEq: r"\ne",
}
# How tightly an expression binds: sums, products, and what stands alone.
_SUM, _PRODUCT, _ATOM = range(3)


def formula(text: RuleText) -> str:
    """The assignments of a rule text as an aligned block of LaTeX, `<-` for what is assigned."""
    lines = [f"{symbol(name)} &\\leftarrow {latex(value)}" for name, value in text.statements]
    return aligned(lines)


def aligned(lines: list[str]) -> str:
    """Lines of LaTeX, aligned at their `&`."""
    body = " \\\\\n".join(lines)
    return f"\\begin{{align*}}\n{body}\n\\end{{align*}}"


def symbol(name: str) -> str:
    """A name of a rule text: a letter for what papers write so, else the word itself."""
    if name in _SYMBOLS:
        return _SYMBOLS[name]
    complement = re.fullmatch(r"one_minus_(\w+)", name)
    if complement:
        return rf"(1 - {symbol(complement[1])})"
    letter = re.fullmatch(rf"({'|'.join(_GREEK)})(\d?)", name)
    if letter:
        return rf"\{letter[1]}" + (f"_{letter[2]}" if letter[2] else "")
    return rf"\text{{{name}}}"


def latex(node: ast.expr) -> str:
    """An expression of the rule language as LaTeX."""
    return _written(node)[0]


def _written(node: ast.expr) -> tuple[str, int]:
    match node:
        case ast.Constant(value=int() | float() as value):
            return f"{value:g}", _ATOM
        case ast.Name(id=name):
            return symbol(name), _ATOM
        case ast.UnaryOp(operand=operand):
            return f"-{_at_least(operand, _PRODUCT)}", _SUM
        case ast.BinOp(op=ast.Div(), left=left, right=right):
            return rf"\frac{{{latex(left)}}}{{{latex(right)}}}", _ATOM
        case ast.BinOp(op=ast.Mult(), left=left, right=right):
            return rf"{_at_least(left, _PRODUCT)}\, {_at_least(right, _PRODUCT)}", _PRODUCT
        case ast.BinOp(op=op, left=left, right=right):
            least = _PRODUCT if isinstance(op, ast.Sub) else _SUM
            sign = "-" if isinstance(op, ast.Sub) else "+"
            return f"{latex(left)} {sign} {_at_least(right, least)}", _SUM
        case ast.Call(func=ast.Name(id=name), args=arguments):
            return _call(name, arguments)
    raise TypeError(f"not of the rule language: {ast.unparse(node)}")


def _at_least(node: ast.expr, least: int) -> str:
    text, strength = _written(node)
    return text if strength >= least else rf"\left({text}\right)"


def _call(name: str, arguments: list[ast.expr]) -> tuple[str, int]:
    match name, arguments:
        case "fma", [a, b, c]:
            product = rf"{_at_least(a, _PRODUCT)}\, {_at_least(b, _PRODUCT)}"
            return f"{product} + {latex(c)}", _SUM
        case "sqrt", [a]:
            return rf"\sqrt{{{latex(a)}}}", _ATOM
        case "abs", [a]:
            return rf"\lvert {latex(a)} \rvert", _ATOM
        case "sign" | "max" | "min", _:
            word = rf"\{name}" if name != "sign" else r"\operatorname{sign}"
            return rf"{word}\left({', '.join(map(latex, arguments))}\right)", _ATOM
        case "where", [condition, yes, no]:
            return _cases(condition, yes, no), _ATOM
    raise TypeError(f"no function of the rule language: {name} of {len(arguments)}")


def _cases(condition: ast.expr, yes: ast.expr, no: ast.expr) -> str:
    """A choice; choices within one that end in the same value are one with all conditions."""
    conditions = [_condition(condition)]
    while _is_choice(yes) and ast.dump(yes.args[2]) == ast.dump(no):
        conditions.append(_condition(yes.args[0]))
        yes = yes.args[1]
    met = r",\ ".join(conditions)
    cases = rf"{latex(yes)} & \text{{if }} {met} \\ {latex(no)} & \text{{else}}"
    return rf"\begin{{cases}} {cases} \end{{cases}}"


def _is_choice(node: ast.expr) -> TypeGuard[ast.Call]:
    return (
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "where"
    )


def _condition(node: ast.expr) -> str:
    match node:
        case ast.Compare(left=left, ops=[op], comparators=[right]):
            return f"{latex(left)} {_COMPARISONS[type(op)]} {latex(right)}"
    raise TypeError(f"no comparison of the rule language: {ast.unparse(node)}")
