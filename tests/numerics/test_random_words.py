"""The random bits of codes: those of the definition, and others for each state."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from optfactory import resolve
from optfactory.build.compiler import load_library
from optfactory.rules.codegen import KernelVariant, cpp_source
from optfactory.rules.options import KernelOptions
from tests.reference.rounding import mix, random_words
from tests.unit.harness import needs_compiler

BLOCK = 256
WORDS = """
extern "C" void draw_block(uint32_t key, int64_t element, uint32_t* words) {
  const Noise noise = Noise::of(key, element);
  for (int i = 0; i < BLOCK; i += kStride) {
    Uints some[kVectors];
    draw(noise, i, some);
    for (int v = 0; v < kVectors; ++v) store(words + i + v * kWidth, some[v]);
  }
}
"""


@needs_compiler
@pytest.mark.parametrize("before", [0, 1, 37, 255, 256, 1000])
@pytest.mark.parametrize("elements", [0, 2**32, 3 * 2**32])
def test_blocks_that_reach_the_next_of_the_upper_halves(elements: int, before: int) -> None:
    """A tensor may have more than 2^32 elements."""
    config = resolve("lion8bit")
    rule = config.rule(config.model_dump())
    options = KernelOptions(random_codes=True)
    source = cpp_source(KernelVariant(rule, "float", "float", ("map8",), BLOCK, options))
    library = load_library(source + WORDS, "random_words")
    first = max(elements - before, 0)
    got = np.zeros(BLOCK, np.uint32)
    library.draw_block(ctypes.c_uint32(77), ctypes.c_int64(first), ctypes.c_void_p(got.ctypes.data))
    numbers = np.arange(first, first + BLOCK, dtype=np.uint64)
    with np.errstate(over="ignore"):
        key = mix(np.uint32([77]) + np.uint32(0x9E3779B9))
        high = mix((numbers >> np.uint64(32)).astype(np.uint32) ^ key)
        assert (got == mix(high ^ numbers.astype(np.uint32))).all()


@pytest.mark.parametrize("pair", [(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)], ids=str)
def test_states_are_rounded_independently(pair: tuple[int, int]) -> None:
    """All 256 pairs of sixteenths are equally frequent: 340 is passed by chance in 3 of 10,000."""
    one, other = (random_words(5, 0, 9, 2**20, state) >> 28 for state in pair)
    counts = np.bincount(one * 16 + other, minlength=256)
    expected = 2**20 / 256
    assert ((counts - expected) ** 2).sum() / expected < 340
