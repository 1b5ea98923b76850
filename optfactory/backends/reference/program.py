"""Rule texts as torch operations, evaluated from the checked syntax tree."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from optfactory.rules.language import (
    RuleText,
    UpdateRule,
    read_trust_ratio_text,
    read_update_text,
)

_OPERATORS: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}

Values = Mapping[str, Any]


@dataclass(frozen=True)
class TorchProgram:
    """A rule text as a sequence of torch operations on named values."""

    text: RuleText
    functions: Mapping[str, Callable[..., Any]]

    def __call__(self, values: Values) -> dict[str, Any]:
        """Run the text on `values` and return all values, assigned ones replaced."""
        known = dict(values)
        for target, expression in self.text.statements:
            known[target] = self._evaluate(expression, known)
        return known

    def _evaluate(self, node: ast.AST, known: Values) -> Any:
        match node:
            case ast.Constant(value=int() | float() as value):
                return float(value)
            case ast.Name(id=name):
                return known[name]
            case ast.UnaryOp(operand=operand):
                return -self._evaluate(operand, known)
            case (
                ast.BinOp(left=left, op=op, right=right)
                | ast.Compare(left=left, ops=[op], comparators=[right])
            ):
                operation = _OPERATORS[type(op)]
                return operation(self._evaluate(left, known), self._evaluate(right, known))
            case ast.Call(func=ast.Name(id=name), args=arguments):
                return self.functions[name](*(self._evaluate(item, known) for item in arguments))
        raise AssertionError(f"unchecked expression {ast.dump(node)}")


@cache
def torch_update(rule: UpdateRule) -> TorchProgram:
    """The update rule as torch operations: p, g, states and scalars in; states and u out."""
    return TorchProgram(read_update_text(rule), _torch_functions())


@cache
def torch_trust_ratio(rule: UpdateRule) -> TorchProgram:
    """The trust ratio as torch operations: p_norm, u_norm and scalars in; ratio out."""
    return TorchProgram(read_trust_ratio_text(rule), _torch_functions())


@cache
def _torch_functions() -> dict[str, Callable[..., Any]]:
    def like(value: Any, *others: Any) -> torch.Tensor:
        """A constant as a tensor beside the other arguments."""
        tensor = next(item for item in others if isinstance(item, torch.Tensor))
        return torch.as_tensor(value, dtype=tensor.dtype, device=tensor.device)

    def where(condition: Any, a: Any, b: Any) -> Any:
        """As torch.where; a comparison of scalars is known beforehand."""
        if isinstance(condition, bool):
            return a if condition else b
        if not isinstance(a, torch.Tensor) and not isinstance(b, torch.Tensor):
            # Of two numbers torch.where makes the default dtype, which may be any.
            a = torch.as_tensor(a, dtype=torch.float32, device=condition.device)
        return torch.where(condition, a, b)

    def sign(a: Any) -> Any:
        """As kernels have it: torch.sign makes 0 of a NaN, and +0 of -0."""
        return torch.where((a == 0) | (a != a), a, torch.sign(a))

    return {
        "fma": lambda a, b, c: a * b + c,
        "sqrt": torch.sqrt,
        "abs": torch.abs,
        "sign": sign,
        "max": lambda a, b: torch.maximum(like(a, a, b), like(b, a, b)),
        "min": lambda a, b: torch.minimum(like(a, a, b), like(b, a, b)),
        "where": where,
    }
