"""Rows of orthogonalized matrices, each the weights of one neuron, brought to about one length.

NorMuon (Li et al. 2025, arXiv:2510.05491), as its authors' code has it. With O made orthogonal, and
S_r the mean of the squares of its row r,

    v <- beta v + (1 - beta) S
    O'[r] = O[r] / (sqrt(v_r) + 1e-10)
    O'' = O' |O|_F / (|O'|_F + 1e-10)

so that the step of a matrix stays as long as it was. |O|_F and |O'|_F follow from S and v: matrices
are read once and scaled once.
"""

from __future__ import annotations

import torch
from torch import Tensor

_EPS = 1e-10


def mean_squares(stack: Tensor) -> Tensor:
    """S of every row: [count, rows] of matrices [count, rows, cols]."""
    lengths: Tensor = torch.linalg.vector_norm(stack, dim=2)
    return lengths.square_().div_(stack.shape[2])


def second_moment(
    before: Tensor, squares: Tensor, beta: float, found_inf: Tensor | None = None
) -> Tensor:
    """What v becomes, [count, rows]; a row that is not finite leaves it as it was.

    Args:
        before: v.
        squares: S.
        found_inf: not 0 if the step is skipped; on the same device, so that nothing waits for it.
    """
    stays = ~squares.isfinite()
    if found_inf is not None:
        stays |= found_inf != 0
    return torch.where(stays, before, beta * before + (1.0 - beta) * squares)


def row_factors(squares: Tensor, moment: Tensor, cols: int, factor: float) -> Tensor:
    """By what every row of O is multiplied, [count, rows], for `factor` times O''.

    Nothing overflows: S is never more than v / (1 - beta).
    """
    inverse = moment.sqrt().add_(_EPS).reciprocal_()
    before = (squares * cols).sum(dim=1, keepdim=True).sqrt_()
    after = (squares * inverse.square() * cols).sum(dim=1, keepdim=True).sqrt_()
    return inverse * (before / after.add_(_EPS)).mul_(factor)
