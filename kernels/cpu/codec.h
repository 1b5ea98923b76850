// 8-bit state on CPUs: decoding and encoding kStride elements at a time.
// Every target computes the same codes and values.

constexpr int kVectors = 4;
constexpr int kStride = kVectors * kWidth;

// How codes follow from magnitudes by arithmetic; see `lines` in optfactory/state/quantmap.py.
constexpr float kLineMargin = 0x1p-14f;
struct Lines {
  int32_t number[32];  // of the line at the lower end of each exponent, at its remainder by 32
  float split[32];     // the magnitude at which the next line begins
  float slope[16];
  float offset[16];
  int32_t last[16];  // the most that a line gives
};

struct QuantizationMap {
  const float* values;    // [256]
  const uint8_t* planes;  // [4][256]: byte b of the pattern of values[code] is planes[b][code]
  const int32_t* keys;  // at the middle of QuantizationMap.all_keys in optfactory/state/quantmap.py
  const Lines* lines;
};

// The values of kStride codes, times a scale.
OPT_FN void decode(const uint8_t* codes, float scale, const QuantizationMap& map, Floats* x) {
#ifdef __AVX512VBMI__
  // Two permutations look one byte of all 64 values up in registers, which takes less than gathers.
  // Unpacking interleaves within 128-bit lanes: transposing the codes first undoes that.
  const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
  const __m512i code = _mm512_permutexvar_epi32(order, _mm512_loadu_si512(codes));
  const __mmask64 upper = _mm512_movepi8_mask(code);
  __m512i bytes[4];
#pragma GCC unroll 4
  for (int b = 0; b < 4; ++b) {
    const uint8_t* plane = map.planes + 256 * b;
    const __m512i low =
        _mm512_permutex2var_epi8(_mm512_loadu_si512(plane), code, _mm512_loadu_si512(plane + 64));
    const __m512i high = _mm512_permutex2var_epi8(_mm512_loadu_si512(plane + 128), code,
                                                  _mm512_loadu_si512(plane + 192));
    bytes[b] = _mm512_mask_blend_epi8(upper, low, high);
  }
  const __m512i low01 = _mm512_unpacklo_epi8(bytes[0], bytes[1]);
  const __m512i low23 = _mm512_unpacklo_epi8(bytes[2], bytes[3]);
  const __m512i high01 = _mm512_unpackhi_epi8(bytes[0], bytes[1]);
  const __m512i high23 = _mm512_unpackhi_epi8(bytes[2], bytes[3]);
  x[0] = (Floats)_mm512_unpacklo_epi16(low01, low23) * scale;
  x[1] = (Floats)_mm512_unpackhi_epi16(low01, low23) * scale;
  x[2] = (Floats)_mm512_unpacklo_epi16(high01, high23) * scale;
  x[3] = (Floats)_mm512_unpackhi_epi16(high01, high23) * scale;
#else
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) {
    x[v] = gather(map.values, widened(load<Bytes>(codes + v * kWidth))) * scale;
  }
#endif
}

// The extremes of a state so far, as bit patterns: as signed numbers these are ordered as positive
// floats are, as unsigned ones negative floats come behind all positive ones, ordered by magnitude.
struct Extremes {
  Ints positive = {};
  Uints negative = {};

  OPT_MEMBER void add(Floats x, bool is_signed) {
    const Ints bits = bits_of(x);
    if (is_signed) positive = bits > positive ? bits : positive;
    negative = (Uints)bits > negative ? (Uints)bits : negative;
  }
};

// The greatest magnitudes among the positive and the negative values.
struct Magnitudes {
  uint32_t positive, negative;

  OPT_MEMBER bool are_finite() const {
    return positive < kInfinityBits && negative < kInfinityBits;
  }

  // The scale that the values need; see optfactory/state/codec.py for the rules.
  OPT_MEMBER float scale(bool is_signed, const QuantizationMap& map) const {
    const float lowest = is_signed && !BITSANDBYTES ? -map.values[0] : 1.0f;
    return block_scale(bits_float(positive), bits_float(negative), lowest);
  }
};

// An unsigned state has no negative values, so that one of the two extremes says all.
OPT_FN Magnitudes magnitudes(const Extremes& extremes, bool is_signed) {
  const uint32_t most = greatest(extremes.negative);
  const uint32_t negative = most & kSignBit ? most & ~kSignBit : 0;
  return {is_signed ? uint32_t(greatest(extremes.positive)) : most & ~kSignBit, negative};
}

// What the codes of one block's state have in common.
struct Coding {
  float scale = 0.0f;
  Divisor divisor = {};

  OPT_MEMBER bool lifts() const { return divisor.lift != 1.0f; }

  // A block of zeros has scale 0; dividing by 1 instead gives the code of zero.
  OPT_FN Coding of(float scale) { return {scale, make_divisor(scale > 0.0f ? scale : 1.0f)}; }
};

// The codes of x / scale times 2^16, and something below that, by one look-up for each lane.
OPT_FN Ints codes_by_keys(Ints bits, bool is_signed, const QuantizationMap& map) {
  const Ints sign = is_signed ? bits >> 31 : Ints{};  // all ones where negative
  return gather(map.keys, bits >> 16) + ((bits ^ sign) & 0xffff);
}

// AMD's processors, which alone have SSE4a, gather slowly: there, arithmetic finds most codes.
#if defined(__SSE4A__) && defined(__AVX512DQ__) && !BITSANDBYTES
constexpr int kCodeShift = 0;

OPT_FN Ints nearest_codes(Ints bits, bool is_signed, const QuantizationMap& map) {
  const Lines& lines = *map.lines;
  constexpr int kGreaterMagnitude = 0b1011;
  const __m512 size = _mm512_range_ps((__m512)bits, _mm512_set1_ps(0x1p-23f), kGreaterMagnitude);
  const __m512i exponent = _mm512_srli_epi32((__m512i)size, 23);
  const __m512i lower = _mm512_permutex2var_epi32(_mm512_loadu_si512(lines.number), exponent,
                                                  _mm512_loadu_si512(lines.number + 16));
  const __m512 split = _mm512_permutex2var_ps(_mm512_loadu_ps(lines.split), exponent,
                                              _mm512_loadu_ps(lines.split + 16));
  const __m512i line = _mm512_mask_sub_epi32(lower, _mm512_cmp_ps_mask(size, split, _CMP_GE_OQ),
                                             lower, _mm512_set1_epi32(-1));
  const __m512 slope = _mm512_permutexvar_ps(line, _mm512_loadu_ps(lines.slope));
  const __m512 offset = _mm512_permutexvar_ps(line, _mm512_loadu_ps(lines.offset));
  const __m512i last = _mm512_permutexvar_epi32(line, _mm512_loadu_si512(lines.last));
  const __m512 at = _mm512_fmadd_ps(size, slope, offset);
  // Rounding might have taken what is nearly whole across a boundary.
  const __m512 above_whole = _mm512_reduce_ps(at, _MM_FROUND_TO_NEG_INF);
  const __m512 margin = _mm512_set1_ps(2 * kLineMargin);
  if (__builtin_expect(_mm512_cmp_ps_mask(above_whole, margin, _CMP_NGE_UQ), 0))
    return codes_by_keys(bits, is_signed, map) >> 16;
  const __m512i distance = _mm512_min_epi32(_mm512_cvttps_epi32(at), last);
  if (!is_signed) return (Ints)distance;
  const __m512i zero = _mm512_set1_epi32(kZeroCode);
  const __m512i code = _mm512_mask_sub_epi32(_mm512_add_epi32(zero, distance),
                                             _mm512_movepi32_mask((__m512i)bits), zero, distance);
  // Subnormal scales are so coarse that numbers may lie below the least value.
  return (Ints)_mm512_max_epi32(code, _mm512_setzero_si512());
}
#else
constexpr int kCodeShift = 16;

OPT_FN Ints nearest_codes(Ints bits, bool is_signed, const QuantizationMap& map) {
  return codes_by_keys(bits, is_signed, map);
}
#endif

// The codes of x times 2^kCodeShift, and something below that.
template <bool kLifts>
OPT_FN Ints code_of(Floats x, const Coding& coding, bool is_signed, const QuantizationMap& map) {
  const Ints bits = bits_of(divide<kLifts>(x, coding.divisor));
  const Ints code = nearest_codes(bits, is_signed, map);
#if BITSANDBYTES
  // A code moves by one if its value's sign is not that of the number.
  if (is_signed) {
    const Ints plain = coding.scale > 0.0f ? code >> 16 : Ints{};
    const Ints differs = (bits_of(x) ^ bits_of(gather(map.values, plain))) < 0;
    const Ints other = (plain + (x > 0.0f ? splat(1) : splat(255))) & 255;
    return (differs ? other : plain) << 16;
  }
#endif
  return is_signed || !FLOORS ? code : (x > 0.0f ? code : Ints{});
}

// Writes kStride codes from what `code_of` gave for them.
OPT_FN void write_codes(const Ints* code, uint8_t* codes) {
#ifdef __AVX512VBMI__
  // One byte of each number: merged into the bytes of one vector, then put in order.
  alignas(64) static const uint8_t order[64] = {
      0, 4, 8,  12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60,  //
      1, 5, 9,  13, 17, 21, 25, 29, 33, 37, 41, 45, 49, 53, 57, 61,  //
      2, 6, 10, 14, 18, 22, 26, 30, 34, 38, 42, 46, 50, 54, 58, 62,  //
      3, 7, 11, 15, 19, 23, 27, 31, 35, 39, 43, 47, 51, 55, 59, 63};
  const auto moved = [&](int v) {  // the code in byte v
    return (__m512i)(kCodeShift <= 8 * v ? code[v] << (8 * v - kCodeShift)
                                         : code[v] >> (kCodeShift - 8 * v));
  };
  __m512i merged = _mm512_mask_blend_epi8(0x2222222222222222u, moved(0), moved(1));
  merged = _mm512_mask_blend_epi8(0x4444444444444444u, merged, moved(2));
  merged = _mm512_mask_blend_epi8(0x8888888888888888u, merged, moved(3));
  _mm512_storeu_si512(codes, _mm512_permutexvar_epi8(_mm512_load_si512(order), merged));
#else
  alignas(64) int32_t wide[kStride];
  for (int v = 0; v < kVectors; ++v) store(wide + v * kWidth, code[v]);
#pragma omp simd
  for (int i = 0; i < kStride; ++i) codes[i] = uint8_t(wide[i] >> kCodeShift);
#endif
}
