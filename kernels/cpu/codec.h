// 8-bit state on CPUs: decoding and encoding kStride elements at a time.
// Every target computes the same codes and values.

constexpr int kVectors = 4;
constexpr int kStride = kVectors * kWidth;

// What optfactory/state/lines.py looks up, twice in a row: widths differ. If RANDOM_CODES, all but
// the values are those of optfactory/state/positions.py.
struct Lines {
  float slope[16];  // of 2 k, whose exponent modulo 8 is its line's number in these two tables
  float offset[16];
  float split[16];
  float step[16];
  float start[16];  // this and the next only if RANDOM_CODES
  float bend[16];
};

struct QuantizationMap {
  const float* values;    // [256]
  const uint8_t* planes;  // [4][256]: byte b of the pattern of values[code] is planes[b][code]
  const int32_t* keys;  // at the middle of QuantizationMap.all_keys in optfactory/state/quantmap.py
  const Lines* lines;
};

// The values of kVectors vectors of codes, times a scale.
OPT_FN void values_by_lines(const Ints* code, float scale, bool is_signed, const Lines& lines,
                            Floats* x) {
  const Table slope = table_of(lines.slope), offset = table_of(lines.offset);
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) {
    // The code in the mantissa of 2^24 counts twice.
    const Floats k2 = floats_of(code[v] | 0x4b800000) - (is_signed ? 0x1p24f + 254 : 0x1p24f - 2);
    const Ints line = bits_of(k2) >> 23;  // modulo 8
    const Ints sign = is_signed ? bits_of(k2) & int32_t(kSignBit) : Ints{};
    const Floats own_offset = floats_of(bits_of(lookup(offset, line)) ^ sign);
    x[v] = rule::fma(lookup(slope, line), k2, own_offset) * scale;
  }
}

// The values of kVectors vectors of codes, times a scale.
OPT_FN void decode_vectors(const Ints* code, float scale, bool is_signed,
                           const QuantizationMap& map, Floats* x) {
  if (LOOKS_UP_IN_REGISTERS && are_computed(is_signed))
    return values_by_lines(code, scale, is_signed, *map.lines, x);
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) x[v] = gather(map.values, code[v]) * scale;
}

// The values of kStride codes, times a scale.
OPT_FN void decode(const uint8_t* codes, float scale, bool is_signed, const QuantizationMap& map,
                   Floats* x) {
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
  Ints code[kVectors];
  widen<kVectors>(codes, code);
  decode_vectors(code, scale, is_signed, map, x);
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
  OPT_FN Coding of(float scale, bool computed) {
    return {scale, make_divisor(scale > 0.0f ? scale : 1.0f, computed)};
  }
};

#if defined(__AVX2__) && !defined(__AVX512F__)
// Writes kStride codes, given as packs of 16 bits; what is not in 0..255 takes the nearer end.
OPT_FN void write_pairs(const __m256i* pairs, uint8_t* codes) {
  // Packing goes by halves of 128 bits, and saturates.
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i packed = _mm256_packus_epi16(pairs[0], pairs[1]);
  store(codes, _mm256_permutevar8x32_epi32(packed, order));
}
#endif

// Writes kStride codes, given times 2^kCodeShift and something below that.
template <int kCodeShift>
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
#elif defined(__AVX2__) && !defined(__AVX512F__)
  __m256i pairs[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
    pairs[i] = _mm256_packs_epi32((__m256i)(code[2 * i] >> kCodeShift),
                                  (__m256i)(code[2 * i + 1] >> kCodeShift));
  write_pairs(pairs, codes);
#else
  alignas(64) int32_t wide[kStride];
  for (int v = 0; v < kVectors; ++v) store(wide + v * kWidth, code[v]);
#pragma omp simd
  for (int i = 0; i < kStride; ++i) codes[i] = uint8_t(wide[i] >> kCodeShift);
#endif
}

// The lines of kVectors vectors of magnitudes. Each operation is done for all of them before the
// next one: processors look only so far ahead for independent work.
OPT_FN void find_lines(const Floats* size, const Lines& lines, Ints* line) {
  constexpr int kLowestHalf = 106 << 7, kGrowth = 5 << 5;
  const Table split = table_of(lines.split);
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v)
    line[v] = scaled_halves<kLowestHalf, kGrowth>(bits_of(size[v]));
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) line[v] -= size[v] >= lookup(split, line[v]);
}

// The numbers k of optfactory/state/lines.py for kVectors vectors of magnitudes.
OPT_FN void find_numbers(const Floats* size, bool is_signed, const Lines& lines, Ints* k) {
  constexpr float kIntercept = 0x1.c71c7p-1f;
  constexpr int32_t kBelowTwo = 0x3fffffff;
  const Table step = table_of(lines.step);
  Ints line[kVectors], m[kVectors];
  find_lines(size, lines, line);
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v)
    m[v] = bits_of(rule::fma(lookup(step, line[v]), size[v], Kind<Floats>::splat(kIntercept)));
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) m[v] = smaller(m[v], splat(kBelowTwo));
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v)
    k[v] = shifted_right(m[v] - (126 << 23), (is_signed ? 23 : 22) - line[v]);
}

// Writes kStride codes, given k, in the signed map with the sign of the number. What is rounded at
// random may lie one beyond the map's ends, from last bits of quotients.
OPT_FN void write_numbers(const Ints* k, bool is_signed, uint8_t* codes) {
#if defined(__AVX512BW__) || !defined(__AVX2__)
  Ints code[kVectors];
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) {
    code[v] = greater(k[v] + (is_signed ? int(kZeroCode) : -1), Ints{});
    if (RANDOM_CODES) code[v] = smaller(code[v], splat(255));
  }
  write_codes<0>(code, codes);
#else
  __m256i pairs[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m256i pair = _mm256_packs_epi32((__m256i)k[2 * i], (__m256i)k[2 * i + 1]);
    pairs[i] = is_signed ? _mm256_add_epi16(pair, _mm256_set1_epi16(kZeroCode))
                         : _mm256_subs_epu16(pair, _mm256_set1_epi16(1));
  }
  write_pairs(pairs, codes);
#endif
}

// Numbers by their scale, and the magnitudes of these.
template <bool kLifts>
OPT_FN void find_sizes(const float* x, const Coding& coding, bool is_signed, Floats* y,
                       Floats* size) {
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) {
    y[v] = divide<kLifts>(load<Floats>(x + v * kWidth), coding.divisor, true);
    size[v] = is_signed ? rule::abs(y[v]) : y[v];
  }
}

// Numbers above 0, whose patterns are at least 1, take at least the code 1.
OPT_FN Ints floored(Ints k, const float* x) {
  return greater(k, smaller(load<Ints>(x) + 1, splat(2)));
}

template <bool kLifts>
OPT_FN void encode_by_lines(const float* x, const Coding& coding, bool is_signed,
                            const Lines& lines, uint8_t* codes) {
  Floats y[kVectors], size[kVectors];
  Ints k[kVectors];
  find_sizes<kLifts>(x, coding, is_signed, y, size);
  find_numbers(size, is_signed, lines, k);
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) {
    if (is_signed) {
      k[v] = with_sign(k[v], bits_of(y[v]));
    } else if (FLOORS) {
      k[v] = floored(k[v], x + v * kWidth);
    } else {
      k[v] &= y[v] >= kLeastUnsigned;
    }
  }
  write_numbers(k, is_signed, codes);
}

// The codes of x / scale times 2^16, and something below that, by one look-up for each lane.
OPT_FN Ints codes_by_keys(Ints bits, bool is_signed, const QuantizationMap& map) {
  const Ints sign = is_signed ? bits >> 31 : Ints{};  // all ones where negative
  return gather(map.keys, bits >> 16) + ((bits ^ sign) & 0xffff);
}

// The codes of x times 2^16, and something below that.
template <bool kLifts>
OPT_FN Ints code_of(Floats x, const Coding& coding, bool is_signed, const QuantizationMap& map) {
  const Ints code = codes_by_keys(
      bits_of(divide<kLifts>(x, coding.divisor, are_computed(is_signed))), is_signed, map);
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

// Writes the codes of kStride elements.
template <bool kLifts>
OPT_FN void encode(const float* x, const Coding& coding, bool is_signed, const QuantizationMap& map,
                   uint8_t* codes) {
  if (LOOKS_UP_IN_REGISTERS && are_computed(is_signed))
    return encode_by_lines<kLifts>(x, coding, is_signed, *map.lines, codes);
  Ints code[kVectors];
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v)
    code[v] = code_of<kLifts>(load<Floats>(x + v * kWidth), coding, is_signed, map);
  write_codes<16>(code, codes);
}
