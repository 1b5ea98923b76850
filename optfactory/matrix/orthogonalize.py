"""Orthogonalization of matrices by polynomials: the direction of Muon.

With the singular value decomposition X / |X|_F = U diag(s) V^T the result is U diag(p(s)) V^T. The
composition p of the steps' polynomials takes all but the smallest s near to 1 (Keller Jordan 2024,
https://kellerjordan.github.io/posts/muon/). Two ways to compute it:

- `_iterate`: X <- a X + (b G + c G^2) X with G = X X^T, on the matrices themselves.
- `_iterate_gram`: the same steps on the smaller Gram matrix only (Zhang, Amsel, Chen & Dao 2026,
  "Gram Newton-Schulz"). With P = a I + b G + c G^2 a step is X <- P X and G <- P G P, so that G and
  Q <- Q P, both n x n, are enough, and the result is Q X. Matrices of 768 x 3072 take half the
  work. But G has the squares of singular values, so that products must be of float32 proper: with
  TensorFloat-32 a tenth of the result for a rank-1 matrix lies outside its span, and all with
  bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from optfactory.errors import ConfigError
from optfactory.matrix.coefficients import Triple
from optfactory.matrix.products import (
    Rounding,
    multiplies_exactly,
    multiplies_rounded,
    multiply,
    multiply_add,
    symmetric_multiply,
)
from optfactory.matrix.scratch import Layout, prefers_gram

DtypeChoice = Literal["auto", "float32", "bfloat16"]

# By how much rounding errors of G, 2^-24 of its norm, may have grown when it is computed afresh:
# below 1, or a singular value of 0 would get a negative square, which the polynomials amplify.
_LARGEST_ERROR = 2.0**-6


@dataclass(frozen=True)
class Orthogonalization:
    """What is done to each matrix.

    Attributes:
        steps: the triple (a, b, c) of each step (`coefficients.steps_of`).
        eps: a smaller Frobenius norm counts as this.
        dtype: what operands of products are rounded to: float32, i.e. not at all, or bfloat16.
            All that is stored is float32.
    """

    steps: tuple[Triple, ...]
    eps: float = 1e-7
    dtype: torch.dtype = torch.float32


def dtype_for(choice: DtypeChoice, device: torch.device | str) -> torch.dtype:
    """The dtype of operands; `auto` is bfloat16 where torch multiplies that into float32."""
    if choice == "auto":
        return torch.bfloat16 if multiplies_rounded(device) else torch.float32
    return torch.float32 if choice == "float32" else torch.bfloat16


@torch.no_grad()
def orthogonalize(
    x: Tensor,
    how: Orthogonalization,
    *,
    out: Tensor | None = None,
    scratch: Tensor | None = None,
) -> Tensor:
    """Orthogonalize each matrix of a stack: U diag(p(s)) V^T, where x / |x|_F = U diag(s) V^T.

    Matrices do not see each other: one that is not finite spoils its own result only, zeros stay
    zeros, and on CPUs a result's bits depend neither on the number of matrices nor on the others.
    A norm beyond 1.8e19, whose square overflows, gives zeros, as in torch.optim.Muon.

    Args:
        x: [batch, rows, cols], of any floating dtype and strides.
        how: steps, eps and dtype.
        out: float32, contiguous, of x's shape; may be x itself. Nothing else is written to.
        scratch: uint8, at least `scratch_bytes(...)` of them, aligned to 4 bytes; else allocated.

    Returns:
        `out`, or a new tensor.

    Raises:
        ConfigError: x is not a stack of matrices, or out or scratch do not fit it.
    """
    if x.ndim != 3:
        raise ConfigError(f"matrices: a stack has three dimensions, got shape {list(x.shape)}")
    if out is None:
        out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    layout = Layout.of(len(x), (x.shape[1], x.shape[2]), how.dtype, x.device)
    if scratch is None:
        scratch = torch.empty(layout.nbytes, dtype=torch.uint8, device=x.device)
    _check_fit(x, out, scratch, layout)
    if x.numel():
        matrices, squares = layout.carve(scratch)
        if _goes_by_gram(x, how):
            _iterate_gram(x, out, matrices[0], squares, how)
        else:
            _iterate(x, out, matrices, squares, how)
    return out


def _goes_by_gram(x: Tensor, how: Orthogonalization) -> bool:
    exact = how.dtype == torch.float32 and multiplies_exactly(x.device)
    return exact and prefers_gram((x.shape[1], x.shape[2]))


def _check_fit(x: Tensor, out: Tensor, scratch: Tensor, layout: Layout) -> None:
    fits = out.shape == x.shape and out.device == x.device and out.is_contiguous()
    if not fits or out.dtype != torch.float32:
        raise ConfigError(
            f"out: {list(out.shape)} of {out.dtype} on {out.device} does not fit matrices "
            f"{list(x.shape)} on {x.device}; give a contiguous float32 tensor of their shape"
        )
    given = scratch.numel() if scratch.dtype == torch.uint8 else 0
    if given < layout.nbytes or scratch.device != x.device:
        raise ConfigError(
            f"scratch: {given} bytes of {scratch.dtype} on {scratch.device}, but {layout.nbytes} "
            f"of uint8 are needed on {x.device}; see scratch_bytes"
        )


def _normalize(into: Tensor, x: Tensor, eps: float, spare: Tensor) -> None:
    """Store x / max(|x|_F, eps), matrix by matrix; `spare` has their shape.

    The norm of a whole matrix at once would be wrong by 4e-5 for GPT-2's and by 5e-3 for the
    largest, as torch sums it in float32. Norms of rows (of columns, where these are longer) come
    first, and each matrix's norm of those alone, so that no sum depends on the size of the stack.
    """
    into.copy_(x)
    batch, rows, cols = x.shape
    lengths = spare.view(-1)[: batch * max(rows, cols)].view(batch, -1)
    torch.linalg.vector_norm(into, dim=2 if rows >= cols else 1, out=lengths)
    norms = torch.stack(torch._foreach_norm(lengths.unbind()))
    into.div_(norms.clamp_(min=eps)[:, None, None])


def _iterate(
    x: Tensor,
    out: Tensor,
    matrices: Sequence[Tensor],
    squares: Sequence[Tensor],
    how: Orthogonalization,
) -> None:
    """X <- a X + (b G + c G^2) X, G = X X^T; X^T X and X (b G + c G^2) for tall matrices."""
    gram, polynomial = squares[:2]
    round_matrix, round_square = Rounding(tuple(matrices[1:])), Rounding(tuple(squares[2:]))
    current, other = (matrices[0], out) if len(how.steps) % 2 else (out, matrices[0])
    wide = x.shape[1] <= x.shape[2]
    _normalize(current, x, how.eps, other)
    for a, b, c in how.steps:
        operand = round_matrix(current)
        symmetric_multiply(gram, *((operand, operand.mT) if wide else (operand.mT, operand)))
        square = round_square(gram)
        symmetric_multiply(polynomial, square, square, base=gram, beta=b, alpha=c)
        square = round_square(polynomial)
        pair = (square, operand) if wide else (operand, square)
        multiply_add(other, current, *pair, beta=a)
        current, other = other, current


def _iterate_gram(
    x: Tensor, out: Tensor, matrix: Tensor, squares: Sequence[Tensor], how: Orthogonalization
) -> None:
    """Q <- Q P and G <- P G P with P = a I + b G + c G^2, and X <- Q X before each restart."""
    gram, polynomial, product, spare = squares[:4]
    starts = (0, *restarts(how.steps))
    current, other = (matrix, out) if len(starts) % 2 else (out, matrix)
    wide = x.shape[1] <= x.shape[2]
    _normalize(current, x, how.eps, other)
    for index, (a, b, c) in enumerate(how.steps):
        if index in starts:
            if index:
                multiply(other, *((product, current) if wide else (current, product)))
                current, other = other, current
            symmetric_multiply(gram, *((current, current.mT) if wide else (current.mT, current)))
        symmetric_multiply(polynomial, gram, gram, base=gram, beta=b, alpha=c)
        if index in starts:
            product.copy_(polynomial).diagonal(dim1=-2, dim2=-1).add_(a)
        else:
            symmetric_multiply(spare, product, polynomial, base=product, beta=a)
            product, spare = spare, product
        if index + 1 < len(how.steps) and index + 1 not in starts:
            symmetric_multiply(spare, gram, polynomial, base=gram, beta=a)
            symmetric_multiply(gram, polynomial, spare, base=spare, beta=a)
    multiply(other, *((product, current) if wide else (current, product)))


def restarts(steps: Sequence[Triple]) -> tuple[int, ...]:
    """The steps before which G is computed from X again, as its errors grow by a^2 in each step."""
    found = []
    error = 2.0**-24
    for index, (a, _, _) in enumerate(steps):
        if error > _LARGEST_ERROR:
            found.append(index)
            error = 2.0**-24
        error *= a * a
    return tuple(found)
