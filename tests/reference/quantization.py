"""Exact block-wise 8-bit quantization, in NumPy, independent of optfactory.

The grid sees a tensor as rows [shape[0], K]; blocks run inside a row and the row's last
block may be short. A tensor of one dimension is a single row, whose scales are flat.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.reference.tables import (
    SIGNED,
    SIGNED_EXACT,
    SIGNED_LINES,
    SYMMETRIC,
    UNSIGNED,
    UNSIGNED_EXACT,
    UNSIGNED_LINES,
    Map,
    middles,
)

Array = NDArray[Any]
Codes = NDArray[np.uint8]

BLOCK = 256
FLOAT32_MAX = float(np.finfo(np.float32).max)

# How far from a boundary, relative to it, codes by lines may be those of either side: a line's
# coefficients are float32 numbers, and so are the reciprocal of the scale and the product with it.
MARGIN = 3e-7


@dataclass(frozen=True)
class Codec:
    """One map with its scale rule, and whether positive values may never become code 0.

    `exact` numbers, of which `values` are the float32 ones, are those of a map by lines, or small
    floats, which have a margin. `bitsandbytes` scales by max |x| and corrects the sign of signed
    codes. Codes are counted in the order of their values.
    """

    values: Map
    zero_code: int
    floor: bool
    bitsandbytes: bool = False
    exact: tuple[Fraction, ...] | None = None
    largest: float = 1.0  # number, by which a block's greatest magnitude is divided

    @property
    def margin(self) -> float:
        """How far from a boundary, relative to it, the code of either side may stand."""
        return MARGIN if self.exact else 0.0

    @cached_property
    def midpoints(self) -> Array:
        """The 255 decision boundaries; those of tables are rounded twice, as float32 does."""
        if self.exact:
            return middles(self.exact)
        total = (self.values[:-1] + self.values[1:]).astype(np.float32)
        return (total * np.float32(0.5)).astype(np.float32)


SIGNED_CODEC = Codec(SIGNED_LINES, zero_code=127, floor=False, exact=SIGNED_EXACT)
UNSIGNED_CODEC = Codec(UNSIGNED_LINES, zero_code=0, floor=True, exact=UNSIGNED_EXACT)
UNFLOORED_CODEC = replace(UNSIGNED_CODEC, floor=False)
SYMMETRIC_CODEC = Codec(SYMMETRIC, zero_code=127, floor=False)
COMPAT_SIGNED_CODEC = Codec(SIGNED, zero_code=127, floor=False, bitsandbytes=True)
COMPAT_UNSIGNED_CODEC = Codec(UNSIGNED, zero_code=0, floor=False)


def _small(exponent: int, mantissa: int, signed: bool) -> tuple[Codec, NDArray[np.int64]]:
    """Small floats below 2, and the place of each stored code among their values.

    With a sign the least exponent is that of subnormal numbers; 4 bits of exponent and 3 of
    mantissa have a NaN at the end, of which there is none stored.
    """
    sizes = []
    for code in range(2 ** (exponent + mantissa)):
        power, part = divmod(code, 2**mantissa)
        is_subnormal = signed and power == 0
        whole = Fraction(part, 2**mantissa) + (0 if is_subnormal else 1)
        sizes.append(whole * Fraction(2) ** (power + is_subnormal + 1 - 2**exponent))
    if (exponent, mantissa, signed) == (4, 3, True):
        sizes.pop()
    count = len(sizes)
    exact = (*(-x for x in reversed(sizes[1:])), *sizes) if signed else tuple(sizes)
    values = np.array([float(x) for x in exact], np.float32)
    zero, sign = (count - 1 if signed else 0), 2 ** (exponent + mantissa)
    places = np.full(2 * sign if signed else sign, -1, np.int64)
    places[:count] = zero + np.arange(count)
    if signed:
        places[sign + 1 : sign + count] = zero - np.arange(1, count)
    return Codec(values, zero, False, exact=exact, largest=float(exact[-1])), places


# By width, of states with a sign and of others.
SMALL = {
    "fp8": {True: _small(4, 3, True), False: _small(5, 3, False)},
    "4bit": {True: _small(2, 1, True), False: _small(3, 1, False)},
}


def nearest_code(y: Array, codec: Codec) -> Codes:
    """Index of the nearest entry by `codec.midpoints`; a tie goes to the even index.

    Both keep their precision: float32 and float64 numbers are compared exactly.
    """
    y = np.asarray(y)
    bounds = codec.midpoints.astype(np.promote_types(codec.midpoints.dtype, y.dtype))
    below = np.searchsorted(bounds, y, side="left")
    above = np.searchsorted(bounds, y, side="right")
    codes = np.where(below % 2 == 0, below, above)
    return np.where(below == above, below, codes).astype(np.uint8)


def grid(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and row length K of a tensor; one row if it has fewer than two dimensions."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])


def scales_shape(shape: tuple[int, ...], block_size: int = BLOCK) -> tuple[int, ...]:
    """[R, ceil(K / block)], or [ceil(n / block)] for fewer than two dimensions."""
    rows, length = grid(shape)
    blocks = -(-length // block_size)
    return (blocks,) if len(shape) < 2 else (rows, blocks)


def expand_scales(scales: Array, shape: tuple[int, ...], block_size: int = BLOCK) -> Array:
    """The scale of every element, in the tensor's shape."""
    rows, length = grid(shape)
    per_row = np.asarray(scales).reshape(rows, -(-length // block_size))
    return np.repeat(per_row, block_size, axis=1)[:, :length].reshape(shape)


def block_maximum(
    x: Array, shape: tuple[int, ...], block_size: int = BLOCK, empty: float = 0.0
) -> Array:
    """Maximum of x over every block, in the scales' shape."""
    rows, length = grid(shape)
    blocks = -(-length // block_size)
    padded = np.full((rows, blocks * block_size), empty, dtype=x.dtype)
    padded[:, :length] = x.reshape(rows, length)
    return (
        padded.reshape(rows, blocks, block_size)
        .max(axis=2)
        .reshape(scales_shape(shape, block_size))
    )


def block_scales(
    x: Array, codec: Codec, finite: Array | None = None, block_size: int = BLOCK
) -> Array:
    """Scale of every block over its finite elements, in x's precision.

    Unsigned and in bitsandbytes: max |x|. Signed: max(max x, -min x / 0.99296874), so that the
    extreme element is stored exactly on either side; the symmetric map has a 1 in that place.
    Never above the largest float32.
    """
    x = np.asarray(x)
    kept = x if finite is None else np.where(finite, x, 0).astype(x.dtype)
    if codec.values[0] >= 0 or codec.bitsandbytes or codec.largest != 1:
        return block_maximum(np.abs(kept), x.shape, block_size) / codec.largest
    lowest = -codec.values[0].astype(x.dtype)
    with np.errstate(over="ignore"):
        negative = (np.maximum(-kept, 0) / lowest).astype(x.dtype)
    scales = block_maximum(np.maximum(np.maximum(kept, 0), negative), x.shape, block_size)
    return np.minimum(scales, x.dtype.type(FLOAT32_MAX))


def normalized(x: Array, scales: Array, block_size: int = BLOCK) -> Array:
    """y = x / scale in x's precision; 0 in a block whose scale is 0."""
    divisor = expand_scales(np.asarray(scales).astype(x.dtype), x.shape, block_size)
    safe = np.where(divisor > 0, divisor, 1).astype(x.dtype)
    return np.where(divisor > 0, x / safe, 0).astype(x.dtype)


def finite32(*values: Array) -> Array:
    """Where every one of the values is still finite once rounded to float32."""
    with np.errstate(over="ignore", invalid="ignore"):
        masks = [np.isfinite(np.asarray(v).astype(np.float32)) for v in values]
    return np.logical_and.reduce(masks)


def codes_for(
    x: Array, scales: Array, codec: Codec, finite: Array | None = None, block_size: int = BLOCK
) -> Codes:
    """Codes of x under given scales: nearest entry, floor, code of 0 where not finite."""
    x = np.asarray(x)
    finite = finite32(x) if finite is None else finite
    y = normalized(np.where(finite, x, 0).astype(x.dtype), scales, block_size)
    codes = nearest_code(y, codec)
    if codec.floor:
        with np.errstate(over="ignore", invalid="ignore"):
            positive = x.astype(np.float32) > 0
        codes = np.where(positive & (codes == 0), 1, codes)
    if codec.bitsandbytes:
        divisor = expand_scales(np.asarray(scales), x.shape, block_size)
        codes = fix_sign(np.where(divisor > 0, codes, 0), x, codec)
    return np.where(finite, codes, codec.zero_code).astype(np.uint8)


def fix_sign(codes: Codes, x: Array, codec: Codec) -> Codes:
    """bitsandbytes: the next code towards x where the code's value has the other sign.

    Zeros count by their sign bit, and codes wrap around: +0 in a block of zeros becomes 255.
    """
    differs = np.signbit(codec.values[codes]) != np.signbit(x)
    moved = codes.astype(np.int64) + np.where(x > 0, 1, -1)
    return np.where(differs, moved % 256, codes).astype(np.uint8)


def encode(
    x: Array, codec: Codec, finite: Array | None = None, block_size: int = BLOCK
) -> tuple[Codes, NDArray[np.float32]]:
    """Codes and float32 scales of a tensor.

    float32 input: the arithmetic of the specification, bit for bit with tables. float64 input:
    exact up to float64, with the scale rounded to float32 at the end.
    """
    x = np.asarray(x)
    finite = finite32(x) if finite is None else finite
    scales = block_scales(x, codec, finite, block_size).astype(np.float32)
    return codes_for(x, scales, codec, finite, block_size), scales


def assert_encodes(
    codes: Codes, scales: Array, x: Array, codec: Codec, block_size: int = BLOCK
) -> None:
    """These are the scales of float32 numbers and their nearest codes, up to the codec's margin."""
    finite = finite32(x)
    want = block_scales(x, codec, finite, block_size)
    assert np.array_equal(np.reshape(scales, want.shape), want)
    seen = np.asarray(x, dtype=np.float64) if codec.margin else x  # tables: float32 quotients
    with np.errstate(invalid="ignore"):
        one, other = (
            codes_for(seen * (1 + sign * codec.margin), want, codec, finite, block_size)
            for sign in (-1, 1)
        )
    wrong = (codes < np.minimum(one, other)) | (codes > np.maximum(one, other))
    assert not wrong.any(), f"{wrong.sum()} codes of {wrong.size}, first {np.argwhere(wrong)[0]}"


def decode(codes: Codes, scales: Array, codec: Codec, block_size: int = BLOCK) -> Array:
    """value[code] * scale in float64, of the codes' shape."""
    codes = np.asarray(codes)
    factors = expand_scales(np.asarray(scales, dtype=np.float64), codes.shape, block_size)
    return codec.values.astype(np.float64)[codes] * factors


def decode32(codes: Codes, scales: Array, codec: Codec, block_size: int = BLOCK) -> Array:
    """The same product with the one float32 rounding that the specification prescribes."""
    return decode(codes, scales, codec, block_size).astype(np.float32)
