"""CUDA's functions on CPUs: every bit of their results, compared with numpy and the C library."""

from __future__ import annotations

import ctypes
import ctypes.util
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from tests.emulation.driver import EmulatedDriver, EmulatedModule
from tests.unit.harness import needs_compiler

pytestmark = needs_compiler

COUNT = 4096
SOURCE = r"""
extern "C" __global__ void floats(const float* a, const float* b, const float* c, float* fma,
                                  float* cut, float* root, float* quotient, float* least,
                                  float* most) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  fma[i] = __fmaf_rn(a[i], b[i], c[i]);
  cut[i] = __fmaf_rz(a[i], b[i], c[i]);
  root[i] = __fsqrt_rn(a[i]);
  quotient[i] = __fdiv_rn(a[i], b[i]);
  least[i] = min(a[i], b[i]);
  most[i] = max(a[i], b[i]);
}

extern "C" __global__ void integers(const unsigned* a, const unsigned* b, const unsigned* s,
                                    unsigned* bytes, unsigned* same, int* least,
                                    unsigned* mixed, long long* most) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  bytes[i] = __byte_perm(a[i], b[i], s[i]);
  same[i] = __float_as_uint(__uint_as_float(a[i]));
  least[i] = min(int(a[i]), int(b[i]));
  mixed[i] = max(int(a[i]), b[i]);
  most[i] = max((long long)(a[i]) << 20, (long long)(b[i]));
}

extern "C" __global__ void warps(const unsigned* a, double* doubles, long long* longs,
                                 float* floats, unsigned* ballots, int* any, int* all,
                                 unsigned* largest, int* largest_signed) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const unsigned full = 0xffffffffu, value = a[i];
  doubles[i] = __shfl_sync(full, value / 3.0, i + 5);
  longs[i] = __shfl_xor_sync(full, (long long)(value) << 20, 9);
  floats[i] = __shfl_down_sync(full, __uint_as_float(value), 7);
  ballots[i] = __ballot_sync(full, value & 4);
  any[i] = __any_sync(full, value % 50 == 0);
  all[i] = __all_sync(full, value % 50 != 0);
  largest[i] = __reduce_max_sync(full, value);
  largest_signed[i] = __reduce_max_sync(full, int(value | 0x80000000u));
}
"""


@pytest.fixture(scope="module")
def module() -> EmulatedModule:
    return EmulatedDriver().module(SOURCE, "intrinsics", 128, torch.device("cpu"))


def patterns(seed: int) -> np.ndarray:
    """Random bits; as floats of all magnitudes, with some special ones."""
    bits = np.random.default_rng(seed).integers(0, 2**32, COUNT, dtype=np.uint32)
    special = [0, 1 << 31, 0x7F800000, 0xFF800000, 0x7FC00001, 1, 0x007FFFFF, 0x3F800000]
    bits[seed::64] = np.resize(np.array(special, np.uint32), len(bits[seed::64]))
    return bits


def launch(module: EmulatedModule, kernel: str, inputs: list, dtypes: str) -> list[np.ndarray]:
    outputs = [np.zeros(COUNT, dtype) for dtype in dtypes.split()]
    pointers = [np.array(array.ctypes.data, np.uint64) for array in (*inputs, *outputs)]
    module.launch(kernel, COUNT // 128, pointers)
    return outputs


def assert_same(got: np.ndarray, wanted: np.ndarray) -> None:
    """Bit by bit, but any NaN is as good as another."""
    both_nan = np.isnan(got) & np.isnan(wanted)
    assert np.array_equal(got.view(np.uint32)[~both_nan], wanted.view(np.uint32)[~both_nan])


def cut_off(a: float, b: float, c: float) -> float:
    """The float32 number next to a * b + c, and not beyond it."""
    if not all(map(math.isfinite, (a, b, c))):
        return a * b + c
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    if exact == 0:
        return a * b + c
    exponent = exact.numerator.bit_length() - exact.denominator.bit_length()
    unit = Fraction(2) ** (max(exponent, -126) - 23)
    cut = min(abs(exact) // unit * unit, Fraction(np.finfo(np.float32).max.item()))
    return math.copysign(float(cut), exact)


def test_floats_are_rounded_once(module: EmulatedModule) -> None:
    a, b, c = (patterns(seed).view(np.float32).copy() for seed in range(3))
    # Rounded to float64 first, the sum would be a tie, and be rounded to even then.
    a[0], b[0], c[0] = 1 + 2**-12, 1 + 2**-12, 2**-40
    a[1:500] = np.linspace(1, 2, 499, dtype=np.float32)
    b[1:500] = np.linspace(2, 1, 499, dtype=np.float32)
    c[1:500] = -a[1:500] * b[1:500]  # leaves the product's rounding error
    results = launch(module, "floats", [a, b, c], "f4 f4 f4 f4 f4 f4")
    fma, cut, root, quotient, least, most = results
    fmaf = ctypes.CDLL(ctypes.util.find_library("m")).fmaf
    fmaf.restype, fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3
    triples = list(zip(a.tolist(), b.tolist(), c.tolist(), strict=True))
    assert_same(fma, np.array([fmaf(*triple) for triple in triples], np.float32))
    assert_same(cut, np.array([cut_off(*triple) for triple in triples], np.float32))
    with np.errstate(all="ignore"):
        assert_same(root, np.sqrt(a))
        assert_same(quotient, a / b)
        equal = a == b
        assert_same(least[~equal], np.fmin(a, b)[~equal])
        assert_same(most[~equal], np.fmax(a, b)[~equal])


def test_minus_zero_is_less_than_zero(module: EmulatedModule) -> None:
    a, b = np.zeros(COUNT, np.float32), np.zeros(COUNT, np.float32)
    a[::2] = b[1::2] = -0.0
    *_, least, most = launch(module, "floats", [a, b, a], "f4 f4 f4 f4 f4 f4")
    assert np.signbit(least).all()
    assert not np.signbit(most).any()


def test_integers(module: EmulatedModule) -> None:
    a, b, selector = (patterns(seed) for seed in range(3))
    outputs = launch(module, "integers", [a, b, selector], "u4 u4 i4 u4 i8")
    chosen = selector[:, None] >> np.arange(0, 16, 4, dtype=np.uint32) & 7
    sources = np.concatenate([a.view(np.uint8).reshape(-1, 4), b.view(np.uint8).reshape(-1, 4)], 1)
    wanted = [
        np.take_along_axis(sources, chosen.astype(np.int64), 1).view(np.uint32).ravel(),
        a,
        np.minimum(a.view(np.int32), b.view(np.int32)),
        np.maximum(a, b),
        np.maximum(a.astype(np.int64) << 20, b.astype(np.int64)),
    ]
    for got, right in zip(outputs, wanted, strict=True):
        assert np.array_equal(got, right)


def test_warps(module: EmulatedModule) -> None:
    a = patterns(0)
    outputs = launch(module, "warps", [a], "f8 i8 u4 u4 i4 i4 u4 i4")
    rows, lanes = a.reshape(-1, 32), np.arange(32)

    def each(row: np.ndarray) -> np.ndarray:
        return np.repeat(row[:, None], 32, axis=1)

    down = np.where(lanes + 7 < 32, lanes + 7, lanes)
    multiples = rows % 50 == 0
    wanted = [
        rows[:, (lanes + 5) % 32] / 3.0,
        rows[:, lanes ^ 9].astype(np.int64) << 20,
        rows[:, down],
        each(((rows >> 2 & 1) << lanes).sum(axis=1)),
        each(multiples.any(axis=1)),
        each(~multiples.any(axis=1)),
        each(rows.max(axis=1)),
        each((rows | np.uint32(1 << 31)).view(np.int32).max(axis=1)),
    ]
    for got, right in zip(outputs, wanted, strict=True):
        assert np.array_equal(got.reshape(-1, 32), right)
