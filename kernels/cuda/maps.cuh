// The quantization maps on GPUs: values of codes and codes of numbers, by arithmetic or by tables.
// optfactory/backends/cuda/maps.py writes a map's struct, which blocks copy to shared memory.

// One struct per map and not per state: that of the signed map, and that of the unsigned one.
struct MapPointers {
  const uint32_t* words[2];
};

#if QUANTIZED

// What stands for a map that no state has.
struct NoMap {};
OPT_FN float lowest_of(const NoMap&) { return 1.0f; }
OPT_FN void decode_by(const NoMap&, const Pack<uint8_t>&, float, float*) {}
OPT_FN void encode_by(const NoMap&, const float*, float, const uint32_t*, Pack<uint8_t>&) {}

// ---- by arithmetic; optfactory/state/lines.py and positions.py are the definition ---------------

struct alignas(8) Line {
  float slope;  // of 2 k
  float offset;
};

struct alignas(8) End {
  float start;
  float bend;
};

// Neighbouring entries lie in different banks, so that lanes which look up different ones need not
// wait for each other.
template <bool kSigned>
struct Lines {
  Line values[8];        // by e % 8
  float steps[8];        // by line
  int32_t octaves[128];  // Lines.octaves; if RANDOM_CODES, those of positions, and the next
#if RANDOM_CODES
  End ends[8];  // by line
#endif
};

// The magnitude of the least value.
OPT_FN float lowest_of(const Lines<true>&) { return 0x1.fc6664p-1f; }

// The values of a thread's codes, times a scale.
template <bool kSigned>
OPT_FN void decode_by(const Lines<kSigned>& map, const Pack<uint8_t>& codes, float scale,
                      float* x) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    // The code in the mantissa of 2^24 counts twice.
    const uint32_t above = __byte_perm(codes.words[i / 4], 0x4b800000u, 0x7650u + i % 4);
    const float k2 = bits_float(above) - (kSigned ? 0x1p24f + 254.0f : 0x1p24f - 2.0f);
    const Line line = map.values[float_bits(k2) >> 23 & 7];
    const uint32_t sign = kSigned ? float_bits(k2) & kSignBit : 0u;
    const float offset = bits_float(float_bits(line.offset) ^ sign);
    x[i] = rule::fma(line.slope, k2, offset) * scale;
  }
}

// A power of two: the leading bit of the numbers k of a magnitude's line.
template <bool kSigned>
OPT_FN uint32_t power_of(const Lines<kSigned>& map, float size) {
  const uint32_t bits = float_bits(size);
  return (bits + uint32_t(map.octaves[bits >> 23])) & kInfinityBits;
}

#if RANDOM_CODES
// The code of x, whose magnitude by the scale is `size`, in the lowest byte.
template <bool kSigned>
OPT_FN uint32_t code_of(const Lines<kSigned>& map, float x, float size, uint32_t random) {
  const int e = int(power_of(map, size) >> 23) - 127, line = kSigned ? e : e - 1;
  const End end = map.ends[line];
  float m = rule::fma(map.steps[line], size, end.start);
  m = fminf(m, rule::fma(m, kThird, end.bend));
  if (kSigned) m = fminf(m, rule::fma(kFirstSigned, size, 0.5f));
  if (!kSigned && !FLOORS && size < kLeastPosition) m = rule::fma(kFirstUnsigned, size, 0.75f);
  const uint32_t position = (float_bits(m) - (126u << 23)) << e;
  const int k = int((position + (random >> 9)) >> 23);
  // Last bits of quotients may lead beyond the map's ends.
  if (kSigned) return uint32_t(x < 0.0f ? 127 - (k < 127 ? k : 127) : 127 + (k < 128 ? k : 128));
  const int least = FLOORS && x > 0.0f ? 2 : 1;
  return uint32_t((k < least ? least : k < 256 ? k : 256) - 1);
}
#else
// The code of x, whose magnitude by the scale is `size`, in the lowest byte of the float's pattern:
// it is cut off behind the units.
template <bool kSigned>
OPT_FN uint32_t code_of(const Lines<kSigned>& map, float x, float size, uint32_t) {
  constexpr float kIntercept = 0x1.c71c7p-1f, kBelowTwo = 0x1.fffffep0f, kUnit = 0x1p23f;
  if (!kSigned && !FLOORS) size = size >= kLeastUnsigned ? size : 0.0f;
  const uint32_t power = power_of(map, size);
  const float step = map.steps[(power >> 23) - (kSigned ? 127 : 128)];
  const float m = fminf(rule::fma(step, size, kIntercept), kBelowTwo);
  const float code = __fmaf_rz(m, bits_float(power), kUnit + (kSigned ? 127.0f : -1.0f));
  if (kSigned) return float_bits(x < 0.0f ? 2.0f * kUnit + 254.0f - code : code);
  return float_bits(FLOORS && x > 0.0f ? fmaxf(code, kUnit + 1.0f) : code);
}
#endif

// Brings numbers and the divisor by a power of two to where its reciprocal is normal. Positive
// numbers stay so, and none is below the least value: only such divisors let it be.
template <bool kSigned>
OPT_FN void lift(float* x, float& divisor, float by) {
  divisor *= by;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const float lowest = kSigned ? -0.995f * divisor : x[i] > 0.0f ? 0x1p-149f : x[i];
    x[i] = fmaxf(x[i] * by, lowest);
  }
}

template <bool kSigned>
OPT_FN void encode_by(const Lines<kSigned>& map, const float* x, float scale,
                      const uint32_t* random, Pack<uint8_t>& codes) {
  float from[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) from[i] = x[i];
  // As make_divisor. It is done once at most; loops are not worth a predicate to compilers, with
  // which all threads would do it.
  float divisor = scale > 0.0f ? fminf(scale, 0x1.fffffep127f) : 1.0f;
  while (divisor < 0x1p-120f) lift<kSigned>(from, divisor, 0x1p80f);
  while (divisor > 0x1p120f) lift<kSigned>(from, divisor, 0x1p-80f);
  const float reciprocal = 1.0f / divisor;
#pragma unroll
  for (int i = 0; i < kVector; i += 4) {
    uint32_t code[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float size = __saturatef(fabsf(from[i + j]) * reciprocal);
      code[j] = code_of(map, from[i + j], size, RANDOM_CODES ? random[i + j] : 0u);
    }
    const uint32_t low = __byte_perm(code[0], code[1], 0x0040u);
    const uint32_t high = __byte_perm(code[2], code[3], 0x0040u);
    codes.words[i / 4] = __byte_perm(low, high, 0x5410u);
  }
}

// ---- by tables ----------------------------------------------------------------------------------

// Key range of QuantizationMap.keys: the upper halves of the patterns of 2^-23 and of 1.
constexpr int32_t kLowestKey = 104 << 7;
constexpr int32_t kHighestKey = 127 << 7;
constexpr int32_t kKeyCount = kHighestKey - kLowestKey + 1;
constexpr float kSmallestKeyed = 0x1p-23f;

template <bool kSigned>
struct Table {
  float values[256];
  int32_t keys[kSigned ? 2 * kKeyCount : kKeyCount];  // no negative values in unsigned maps
};

OPT_FN float lowest_of(const Table<true>& map) { return BITSANDBYTES ? 1.0f : -map.values[0]; }

template <bool kSigned>
OPT_FN void decode_by(const Table<kSigned>& map, const Pack<uint8_t>& codes, float scale,
                      float* x) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) x[i] = map.values[get(codes, i)] * scale;
}

// The code of the map value nearest to y in [-1, 1], ties to even; see QuantizationMap.keys.
// Magnitudes below `smallest`, which is kSmallestKeyed or more, are taken for it.
template <bool kSigned>
OPT_FN int32_t nearest_code(const Table<kSigned>& map, float y, float smallest) {
  const int32_t bits = int32_t(float_bits(y));
  const int32_t magnitude = bits & 0x7fffffff, least = int32_t(float_bits(smallest));
  const int32_t clamped = magnitude > least ? magnitude : least;
  const int32_t sign = kSigned ? bits >> 31 : 0;  // all ones if y is negative
  const int32_t entry = map.keys[(clamped >> 16) - kLowestKey + (sign & kKeyCount)];
  return (entry + ((clamped ^ sign) & 0xffff)) >> 16;
}

// bitsandbytes moves a code by one if its value's sign is not that of the number.
OPT_FN int32_t fix_sign(int32_t code, float x, float value) {
  const bool differs = ((float_bits(x) ^ float_bits(value)) & kSignBit) != 0;
  return differs ? (code + (x > 0.0f ? 1 : 255)) & 255 : code;
}

// The code of x, y being x divided by the scale.
template <bool kSigned>
OPT_FN int32_t code_of(const Table<kSigned>& map, float x, float y, float scale, float smallest) {
  const int32_t code = nearest_code(map, y, smallest);
#if BITSANDBYTES
  if (kSigned) return fix_sign(scale > 0.0f ? code : 0, x, map.values[scale > 0.0f ? code : 0]);
#endif
  return kSigned || !FLOORS || x > 0.0f ? code : 0;
}

#if RANDOM_CODES
// Makes of the nearest codes of a thread's elements such that are rounded at random.
template <bool kSigned>
OPT_FN void round_codes(const Table<kSigned>& map, const float* x, float scale,
                        const uint32_t* random, Pack<uint8_t>& codes) {
  Pack<uint8_t> chosen = {};
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const int code = get(codes, i);
    const float nearest = map.values[code] * scale;
    const int other = other_code(code, x[i] > nearest, kSigned, x[i]);
    const float uniform = float(int(random[i] >> 8));
    const bool moves = takes_other(x[i], nearest, map.values[other] * scale, uniform);
    set(chosen, i, uint8_t(moves ? other : code));
  }
  codes = chosen;
}
#endif

template <bool kSigned>
OPT_FN void encode_by(const Table<kSigned>& map, const float* x, float scale,
                      const uint32_t* random, Pack<uint8_t>& codes) {
  const Divisor divisor = make_divisor(scale > 0.0f ? scale : 1.0f, false);
  // A second moment that is not zero must not become zero, because its root divides the step: it
  // takes at least the smallest value.
  const float smallest = FLOORS && !kSigned ? map.values[1] : kSmallestKeyed;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const float y = divide(x[i], divisor, false);
    set(codes, i, uint8_t(code_of(map, x[i], y, scale, smallest)));
  }
#if RANDOM_CODES
  round_codes(map, x, scale, random, codes);
#endif
}

// ---- the maps of this kernel's states -----------------------------------------------------------

#if !ANY_SIGNED
using SignedMap = NoMap;
#elif COMPUTES_SIGNED
using SignedMap = Lines<true>;
#else
using SignedMap = Table<true>;
#endif

#if !ANY_UNSIGNED
using UnsignedMap = NoMap;
#elif COMPUTES_UNSIGNED
using UnsignedMap = Lines<false>;
#else
using UnsignedMap = Table<false>;
#endif

template <class Map>
OPT_FN void load_map(Map& map, const uint32_t* words) {
  uint32_t* target = reinterpret_cast<uint32_t*>(&map);
#pragma unroll 1
  for (int i = threadIdx.x; i < int(sizeof(Map) / 4); i += THREADS) target[i] = words[i];
}

#endif
