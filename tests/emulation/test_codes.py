"""Codes and values of the CUDA kernels' maps, one by one, against those of the portable backend."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from optfactory import resolve
from optfactory.backends.cuda.maps import map_tables
from optfactory.rules.codegen import CUDA_THREADS, KernelVariant, cuda_source
from optfactory.rules.options import KernelOptions
from optfactory.state.codec import decode, encode
from optfactory.state.quantmap import map_for
from optfactory.state.random_codes import encode_at_random
from tests.emulation.arguments import address, integer
from tests.emulation.driver import EmulatedDriver
from tests.emulation.harness import CASES
from tests.unit.harness import needs_compiler

pytestmark = needs_compiler

VECTOR = 8  # elements of a thread
KERNELS = r"""
extern "C" __global__ void encode_all(const MapPointers maps, int is_signed, const float* x,
                                      const float* scales, uint8_t* codes, const uint32_t* random) {
  OPT_SHARED(Shared, shared);
  load_maps(shared, maps);
  const int first = kVector * (blockIdx.x * THREADS + threadIdx.x);
  Pack<uint8_t> pack = {};
  if (is_signed)
    encode_by(shared.signed_map, x + first, scales[first], random + first, pack);
  else
    encode_by(shared.unsigned_map, x + first, scales[first], random + first, pack);
  for (int i = 0; i < kVector; ++i) codes[first + i] = get(pack, i);
}

extern "C" __global__ void decode_all(const MapPointers maps, int is_signed, const uint8_t* codes,
                                      const float* scales, float* values, const uint32_t*) {
  OPT_SHARED(Shared, shared);
  load_maps(shared, maps);
  const int first = kVector * (blockIdx.x * THREADS + threadIdx.x);
  Pack<uint8_t> pack = {};
  for (int i = 0; i < kVector; ++i) set(pack, i, codes[first + i]);
  decode_codes(shared, is_signed ? 0 : 1, pack, scales[first], values + first);
}
"""

OPTIONS = {
    "lines": KernelOptions(),
    "lines-no-floor": KernelOptions(floors=False),
    "symmetric": KernelOptions(symmetric_map=True),
    "symmetric-no-floor": KernelOptions(symmetric_map=True, floors=False),
    "tables": KernelOptions(bitsandbytes=True, floors=False),
    "random": KernelOptions(random_codes=True),
    "random-no-floor": KernelOptions(random_codes=True, floors=False),
    "random-symmetric": KernelOptions(random_codes=True, symmetric_map=True),
}
LARGEST = float(np.finfo(np.float32).max)
NEAR_LIFTS = [2.0**-120 - 2.0**-144, 2.0**-120, 2.0**120, 2.0**120 + 2.0**97]
PLAIN_SCALES = [1.0, 0.3, 3.1415927, 1.9999999, 1e-12, 1e12, *NEAR_LIFTS]
EXTREME_SCALES = [1e-45, 3e-45, 1e-42, 1e-40, 2.0**-126, 1e-37, 1e38, LARGEST]

both_signs = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
all_options = pytest.mark.parametrize("kind", OPTIONS)


@dataclass(frozen=True)
class Maps:
    """The kernels above for one choice of options; `old` is replaced by `new` in their source."""

    kind: str
    old: str = ""
    new: str = ""

    def launch(self, kernel: str, signed: bool, inputs: Tensor, scales: Tensor) -> Tensor:
        count = len(inputs)
        rest = -count % (VECTOR * CUDA_THREADS)
        inputs = torch.cat([inputs, torch.zeros(rest, dtype=inputs.dtype)])
        scales = torch.cat([scales, torch.ones(rest)])
        dtype = torch.uint8 if kernel == "encode_all" else torch.float32
        outputs = torch.zeros(len(inputs), dtype=dtype)
        options, random = OPTIONS[self.kind], random_words(len(inputs))
        tables = map_tables(torch.device("cpu"), options.map_kind, options.random_codes)
        maps = np.zeros(1, dtype=np.dtype([("words", np.int64, (2,))]))
        maps["words"][0] = [table.data_ptr() for table in tables]
        arguments = [maps, integer(signed), *map(address, (inputs, scales, outputs, random))]
        blocks = len(inputs) // (VECTOR * CUDA_THREADS)
        module = EmulatedDriver().module(self._source(), "codes", CUDA_THREADS, inputs.device)
        module.launch(kernel, blocks, arguments)
        return outputs[:count]

    def _source(self) -> str:
        case = CASES["adam-adam-None-8"]
        config = resolve(case.family, **case.asked)
        rule = config.rule(config.model_dump())
        variant = KernelVariant(rule, "float", "float", ("map8",) * 2, 256, OPTIONS[self.kind])
        source = cuda_source(variant)
        assert self.old in source, "the source has changed: plant this bug anew"
        return (source.replace(self.old, self.new) if self.old else source) + KERNELS


def random_words(count: int) -> Tensor:
    """Words of 32 bits, int32; one in four is the least or the greatest."""
    words = torch.randint(-(2**31), 2**31, (count,), generator=torch.Generator().manual_seed(0))
    words[::8], words[4::8] = 0, -1
    return words.to(torch.int32)


def neighbours(x: np.ndarray, count: int) -> np.ndarray:
    """Float32 numbers and so many on each side of each."""
    above = below = x
    found = [x]
    for _ in range(count):
        with np.errstate(over="ignore"):
            above = np.nextafter(above, np.float32(np.inf))
            below = np.nextafter(below, np.float32(-np.inf))
        found += [above, below]
    return np.concatenate(found)


def _numbers(signed: bool, kind: str, scale: float, extreme: bool) -> np.ndarray:
    """Numbers around all boundaries at a scale, and the ends of what it may have."""
    qmap = map_for(signed, OPTIONS[kind].map_kind)
    steps = np.float32(scale)
    values = np.array(qmap.values, np.float32)
    ends = values if OPTIONS[kind].random_codes else np.array(qmap.firsts, np.float32)
    x = np.concatenate([neighbours(ends * steps, 3), neighbours(np.zeros(1, np.float32), 3)])
    x = np.concatenate([x, values * steps, np.array(qmap.firsts, np.float32) * steps])
    x = np.clip(x, values[0] * steps if signed else 0, steps)
    least = [-steps] if signed and (extreme or qmap.lines is None) else []
    return np.concatenate([x, np.array([0.0, *least, steps], np.float32)])


@cache
def numbers(signed: bool, kind: str) -> tuple[Tensor, Tensor]:
    """What is encoded, and the scale of each; those of a thread are equal."""
    rows = list(_rows(signed, kind))
    return torch.cat([x for x, _ in rows]), torch.cat([scales for _, scales in rows])


def _rows(signed: bool, kind: str) -> Iterator[tuple[Tensor, Tensor]]:
    yield torch.zeros(VECTOR), torch.zeros(VECTOR)
    for scale in PLAIN_SCALES + EXTREME_SCALES:
        x = _numbers(signed, kind, scale, scale in EXTREME_SCALES)
        x = np.resize(x, len(x) + -len(x) % VECTOR)
        yield torch.from_numpy(x), torch.full((len(x),), scale)


def wrong_codes(maps: Maps, signed: bool) -> Tensor:
    """Numbers, their scales, the codes that kernels give, and what they should be, where wrong."""
    x, scales = numbers(signed, maps.kind)
    got = maps.launch("encode_all", signed, x, scales)
    options = OPTIONS[maps.kind]
    qmap = map_for(signed, options.map_kind)
    if options.random_codes:
        random = random_words(len(x) + -len(x) % (VECTOR * CUDA_THREADS))[: len(x)]
        wanted = encode_at_random(x, scales, qmap, options, random.long() & 0xFFFFFFFF)
    else:
        wanted = encode(x, scales, qmap, options)
    wrong = got != wanted
    return torch.stack([column[wrong].double() for column in (x, scales, got, wanted)], 1)


@both_signs
@all_options
def test_every_boundary(kind: str, signed: bool) -> None:
    x, _ = numbers(signed, kind)
    assert len(x) > 20_000
    wrong = wrong_codes(Maps(kind), signed)
    assert not len(wrong), wrong[:10].tolist()


@both_signs
@all_options
def test_every_value(kind: str, signed: bool) -> None:
    scales = torch.tensor([0.0, *PLAIN_SCALES, *EXTREME_SCALES]).repeat_interleave(256)
    codes = torch.arange(256, dtype=torch.uint8).repeat(len(scales) // 256)
    got = Maps(kind).launch("decode_all", signed, codes, scales)
    wanted = decode(codes, scales, map_for(signed, OPTIONS[kind].map_kind))
    # Zeros have no sign that matters, but kernels and torch agree on it all the same.
    assert torch.equal(got.view(torch.int32), wanted.view(torch.int32))


PLANTS = {
    "intercept": ("lines", True, "kIntercept = 0x1.c71c7p-1f", "kIntercept = 0x1.c71c72p-1f"),
    "less of it": ("lines", False, "kIntercept = 0x1.c71c7p-1f", "kIntercept = 0x1.c71c6ep-1f"),
    "below two": ("lines", False, "kBelowTwo = 0x1.fffffep0f", "kBelowTwo = 0x1p1f"),
    "rounding": ("lines", True, "__fmaf_rz(m,", "__fmaf_rn(m,"),
    "least value": ("lines", True, "-0.995f", "-1.0f"),
    "floor": ("lines", False, "FLOORS && x > 0.0f", "FLOORS && size > 0.0f"),
    "lifted floor": ("lines", False, "0x1p-149f", "0.0f"),
    "no floor": ("lines-no-floor", False, "size >= kLeastUnsigned", "size > 0.0f"),
    "below the least value": ("random-no-floor", False, "0x1.7799dap19f", "0x1.7799dp19f"),
    "beside zero": ("random", True, "fminf(m, rule::fma(kFirstSigned, size, 0.5f))", "m"),
    "bend": ("random", True, "0x1.555556p-2f", "0x1.555554p-2f"),
    "random bits": ("random", False, "random >> 9", "random >> 10"),
    "beyond the least": ("random", True, "(k < 127 ? k : 127)", "k"),
    "floor at random": ("random", False, "FLOORS && x > 0.0f ? 2", "FLOORS && size > 0.0f ? 2"),
}


@pytest.mark.parametrize("bug", PLANTS)
def test_a_planted_bug_is_noticed(bug: str) -> None:
    kind, signed, old, new = PLANTS[bug]
    assert len(wrong_codes(Maps(kind, old, new), signed))
