"""Batched matrix products whose operands may be rounded, and whose results are float32.

What ruins an iteration in bfloat16 is not that operands are rounded but that results are: each
entry's rounding error points anywhere, and the following steps amplify what is small. Errors of
operands average out in a product's sum. So operands are rounded where that is fast, and nothing
that is kept is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# bmm(a, b, out_dtype) is there since torch 2.8, for CUDA.
_HAS_OUT_DTYPE = hasattr(torch.ops.aten.baddbmm, "dtype_out")

# Products of smaller matrices gain nothing from leaving out half of a symmetric result.
_SMALLEST_SYMMETRIC = 512
_BANDS = 4


def multiplies_rounded(device: torch.device | str) -> bool:
    """Whether torch multiplies bfloat16 operands into float32 results on this device."""
    return torch.device(device).type == "cuda" and _HAS_OUT_DTYPE


def multiplies_exactly(device: torch.device | str) -> bool:
    """Whether float32 products have float32 operands here, by torch's settings.

    `torch.set_float32_matmul_precision("high")` and the like replace them by TensorFloat-32 or
    bfloat16, where the hardware has that.
    """
    backend = torch.backends.cuda if torch.device(device).type == "cuda" else torch.backends.mkldnn
    precision = getattr(getattr(backend, "matmul", None), "fp32_precision", None)
    if precision is None:  # torch before 2.9
        return torch.get_float32_matmul_precision() == "highest"
    return precision in ("none", "ieee")


@dataclass(frozen=True)
class Rounding:
    """Rounds operands of one shape, into buffers of its own.

    Attributes:
        buffers: none for float32; one of the lower dtype where a product takes it; and a float32
            one for its values where products do not.
    """

    buffers: tuple[Tensor, ...]

    def __call__(self, x: Tensor) -> Tensor:
        for buffer in self.buffers:
            x = buffer.copy_(x)
        return x


def multiply(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Compute out = a b of [batch, m, k] and [batch, k, n]; out is float32 and neither a nor b."""
    if a.dtype == torch.float32:
        return torch.bmm(a, b, out=out)
    return torch.bmm(a, b, torch.float32, out=out)


def multiply_add(
    out: Tensor, base: Tensor, a: Tensor, b: Tensor, *, beta: float, alpha: float = 1.0
) -> Tensor:
    """Compute out = beta base + alpha a b; out is float32, neither a nor b, and may be base."""
    if a.dtype == torch.float32:
        return torch.baddbmm(base, a, b, beta=beta, alpha=alpha, out=out)
    if out is not base:
        out.copy_(base)  # torch 2.8 reads the result's place and not `base`
    return torch.baddbmm(out, a, b, torch.float32, beta=beta, alpha=alpha, out=out)


def symmetric_multiply(
    out: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    base: Tensor | None = None,
    beta: float = 0.0,
    alpha: float = 1.0,
) -> None:
    """Compute out = beta base + alpha a b, [batch, n, n], where base and a b are symmetric.

    On CPUs float32 results are computed in bands of rows from the diagonal on, and mirrored: 5/8 of
    the work.

    Args:
        out: neither a nor b nor base.
    """
    size = out.shape[1]
    if a.dtype == torch.float32 and out.device.type == "cpu" and size >= _SMALLEST_SYMMETRIC:
        for target, given, rows, columns in zip(
            out, out if base is None else base, a, b, strict=True
        ):
            _in_bands(target, given, rows, columns, beta, alpha)
    elif base is None:
        multiply(out, a, b)
    else:
        multiply_add(out, base, a, b, beta=beta, alpha=alpha)


def _in_bands(out: Tensor, base: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float) -> None:
    """As `symmetric_multiply`, for one matrix."""
    size = len(out)
    width = -(-size // _BANDS)
    for start in range(0, size, width):
        band = slice(start, start + width)
        target = out[band, start:]
        torch.addmm(base[band, start:], a[band], b[:, start:], beta=beta, alpha=alpha, out=target)
        out[start + width :, band].copy_(out[band, start + width :].mT)
