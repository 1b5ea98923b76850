// A state's elements by its format: a stride is read as float32, and written.

OPT_FN int64_t bytes_of(int j, int64_t elements) { return bytes_of_format(kFormats[j], elements); }

// Runs body(std::integral_constant<int, j>) for all states: what is done follows from their
// formats, and compilers fold conditions of a loop's variable too late.
template <int j = 0, class Body>
OPT_FN void for_each_state(Body body) {
  if constexpr (j < STATES) {
    body(std::integral_constant<int, j>{});
    for_each_state<j + 1>(body);
  }
}
#define OPT_STATE(j) [&](auto j) __attribute__((always_inline))

// What elements that a block does not have are filled with.
OPT_FN uint8_t zero_byte(int j) { return kFormats[j] == kMap8 && kSigned[j] ? kZeroCode : 0; }

// ---- 32 and 16 bits ---------------------------------------------------------------------------

OPT_FN Floats from_bfloat16(const uint8_t* from) {
#if defined(__AVX512F__)
  return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(load<__m256i>(from)), 16);
#elif defined(__AVX2__)
  return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(load<__m128i>(from)), 16);
#else
  Floats x;
  for (int lane = 0; lane < kWidth; ++lane)
    x[lane] = to_float(reinterpret_cast<const bfloat16*>(from)[lane]);
  return x;
#endif
}

// As store_random() in element.cuh, by 16 bits of `random`; adding to infinity leaves it.
OPT_FN void to_bfloat16(uint8_t* to, Floats x, Uints random) {
  const Ints bits = bits_of(x);
  const Ints kept = x == x ? bits + (Ints)random : bits | 0x400000;
#if defined(__AVX512F__)
  store(to, _mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)kept, 16)));
#elif defined(__AVX2__)
  const __m256i upper = _mm256_srli_epi32((__m256i)kept, 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(upper, upper), 0x08);
  store(to, _mm256_castsi256_si128(packed));
#else
  for (int lane = 0; lane < kWidth; ++lane)
    reinterpret_cast<bfloat16*>(to)[lane].bits = uint16_t((uint32_t)kept[lane] >> 16);
#endif
}

// A vector of state j, from element i on.
template <int j>
OPT_FN Floats load_state(const uint8_t* from, int i) {
  const uint8_t* const own = from + bytes_of(j, i);
  if constexpr (kFormats[j] == kBfloat16)
    return from_bfloat16(own);
  else
    return load<Floats>(own);
}

// `random`: of the elements, as all states share it.
template <int j>
OPT_FN void store_state(uint8_t* to, int i, Floats x, Uints random) {
  uint8_t* const own = to + bytes_of(j, i);
  if constexpr (kFormats[j] == kBfloat16)
    to_bfloat16(own, x, half_words_of_state(random, j));
  else
    store(own, x);
}

// ---- with scales ------------------------------------------------------------------------------

#if QUANTIZED

// The scale that a block's values need; see optfactory/state/codec.py for the rules.
OPT_FN float scale_of(int j, const Magnitudes& found, const QuantizationMap& map) {
  const float positive = bits_float(found.positive), negative = bits_float(found.negative);
  if (kFormats[j] != kMap8) return rule::max(positive, negative) / largest_of(kFormats[j]);
  const float lowest = kSigned[j] && !BITSANDBYTES ? -map.values[0] : 1.0f;
  return block_scale(positive, negative, lowest);
}

#endif

// ---- small floats -----------------------------------------------------------------------------

#if defined(__AVX2__) && !defined(__AVX512F__)
#define HAS_BYTES_OF_AVX2 1
#else
#define HAS_BYTES_OF_AVX2 0
#endif

// The codes of a stride of 4 bits.
OPT_FN void widen_halves(const uint8_t* from, Ints* code) {
#if HAS_BYTES_OF_AVX2
  // Eight codes are one word for all lanes; what is above each is left.
  const __m256i places = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v)
    code[v] = (Ints)_mm256_srlv_epi32(_mm256_set1_epi32(load<int32_t>(from + 4 * v)), places);
#elif defined(__AVX512F__)
  const __m512i places = _mm512_set_epi32(24, 28, 16, 20, 8, 12, 0, 4, 24, 28, 16, 20, 8, 12, 0, 4);
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    const __m512i low = _mm512_set1_epi32(load<int32_t>(from + 8 * v));
    const __m512i high = _mm512_set1_epi32(load<int32_t>(from + 8 * v + 4));
    code[v] = (Ints)_mm512_srlv_epi32(_mm512_mask_blend_epi32(0xff00, low, high), places);
  }
#else
  for (int v = 0; v < kVectors; ++v)
    for (int lane = 0; lane < kWidth; lane += 2) {
      const int pair = from[(v * kWidth + lane) / 2];
      code[v][lane] = pair >> 4, code[v][lane + 1] = pair & 15;
    }
#endif
}

template <Format kFormat>
OPT_FN void decode_minifloats(const uint8_t* codes, float scale, Floats* x) {
#if HAS_BYTES_OF_AVX2 && defined(__F16C__)
  if constexpr (kFormat == kE4m3) {
    // In the upper bits of 16 they are 16-bit floats, which one instruction converts.
    const __m256i mask = _mm256_set1_epi16(int16_t(0xbfff));
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v += 2) {
      const __m256i wide = _mm256_cvtepi8_epi16(load<__m128i>(codes + v * kWidth));
      const __m256i half = _mm256_and_si256(_mm256_slli_epi16(wide, 7), mask);
      x[v] = (Floats)_mm256_cvtph_ps(_mm256_castsi256_si128(half)) * scale;
      x[v + 1] = (Floats)_mm256_cvtph_ps(_mm256_extracti128_si256(half, 1)) * scale;
    }
    return;
  }
#endif
  Ints code[kVectors];
  if constexpr (bits_of_format(kFormat) == 4)
    widen_halves(codes, code);
  else
    widen<kVectors>(codes, code);
#if HAS_BYTES_OF_AVX2
  if constexpr (kFormat == kE2m1) {
    const __m256 sizes = _mm256_setr_ps(0.0f, 0.125f, 0.25f, 0.375f, 0.5f, 0.75f, 1.0f, 1.5f);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const Ints sign = code[v] << 28 & int32_t(kSignBit);
      const Ints size = (Ints)_mm256_permutevar8x32_ps(sizes, (__m256i)code[v]);
      x[v] = floats_of(size ^ sign) * scale;
    }
    return;
  }
#endif
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) {
    const Ints own = bits_of_format(kFormat) == 4 ? code[v] & 15 : code[v];
    x[v] = minifloat_value<kFormat, Floats>((Uints)own) * scale;
  }
}

#if QUANTIZED

#if HAS_BYTES_OF_AVX2
// Writes a stride of bytes, or their lower halves.
template <Format kFormat>
OPT_FN void write_bytes(__m256i bytes, uint8_t* codes) {
  if constexpr (bits_of_format(kFormat) == 4) {
    const __m256i pairs = _mm256_maddubs_epi16(bytes, _mm256_set1_epi16(0x0110));
    const __m256i packed = _mm256_packus_epi16(pairs, pairs);
    store(codes, _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
  } else {
    store(codes, bytes);
  }
}
#endif

// Writes a stride of codes, given as magnitudes with a sign.
template <Format kFormat>
OPT_FN void write_minifloats(const Ints* k, uint8_t* codes) {
  using M = Minifloat<kFormat>;
  constexpr int kLast = M::kLast, kSign = 1 << (bits_of_format(kFormat) - 1);
#if HAS_BYTES_OF_AVX2
  // Packing goes by halves of 128 bits, and saturates.
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i last = _mm256_set1_epi8(char(kLast)), sign = _mm256_set1_epi8(char(kSign));
  const __m256i low = _mm256_packs_epi32((__m256i)k[0], (__m256i)k[1]);
  const __m256i high = _mm256_packs_epi32((__m256i)k[2], (__m256i)k[3]);
  if constexpr (M::kHasSign) {
    const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
    const __m256i size = _mm256_min_epu8(_mm256_abs_epi8(bytes), last);
    write_bytes<kFormat>(_mm256_or_si256(size, _mm256_and_si256(bytes, sign)), codes);
  } else {
    const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order);
    write_bytes<kFormat>(_mm256_min_epu8(bytes, last), codes);
  }
#else
  Ints code[kVectors];
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) {
    const Ints negative = M::kHasSign ? k[v] >> 31 : Ints{};
    code[v] = smaller((k[v] ^ negative) - negative, splat(kLast)) | (negative & kSign);
  }
  if constexpr (bits_of_format(kFormat) == 8) {
    write_codes<0>(code, codes);
  } else {
    alignas(64) uint8_t bytes[kStride];
    write_codes<0>(code, bytes);
#if defined(__AVX512BW__)
    const __m512i pairs = _mm512_maddubs_epi16(_mm512_load_si512(bytes), _mm512_set1_epi16(0x0110));
    store(codes, _mm512_cvtepi16_epi8(pairs));
#else
    for (int i = 0; i < kStride; i += 2) codes[i / 2] = uint8_t(bytes[i] << 4 | bytes[i + 1]);
#endif
  }
#endif
}

template <int j, bool kLifts>
OPT_FN void encode_minifloats(const float* x, const Coding& coding, const Uints* words,
                              uint8_t* codes) {
  Divisor divisor = coding.divisor;
  divisor.reciprocal *= kQuotientsBy;
  Ints k[kVectors];
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) {
    const Floats y = divide<kLifts>(load<Floats>(x + v * kWidth), divisor, true);
    const Uints random = bits_of_state<Minifloat<kFormats[j]>::kCut>(words[v], j);
    if constexpr (Minifloat<kFormats[j]>::kHasSign)
      k[v] = with_sign((Ints)minifloat_code<kFormats[j]>(rule::abs(y), random), bits_of(y));
    else
      k[v] = (Ints)minifloat_code<kFormats[j]>(y, random);
  }
  write_minifloats<kFormats[j]>(k, codes);
}

// The codes of a dynamic map of kStride elements.
template <int j, bool kLifts>
OPT_FN void encode_map(const float* x, const Coding& coding, const QuantizationMap& map,
                       const Uints* words, uint8_t* codes) {
#if RANDOM_CODES
  Uints random[kVectors];
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) random[v] = words_of_state(words[v], j);
  if (are_computed(kSigned[j]))
    return encode_by_positions<kLifts>(x, coding, kSigned[j], *map.lines, random, codes);
  encode<kLifts>(x, coding, kSigned[j], map, codes);
  round_codes(x, coding.scale, kSigned[j], map, random, codes);
#else
  encode<kLifts>(x, coding, kSigned[j], map, codes);
#endif
}

// Writes a stride of state j.
template <int j, bool kLifts>
OPT_FN void encode_state(const float* x, const Coding& coding, const QuantizationMap& map,
                         const Uints* words, uint8_t* to) {
  if constexpr (kFormats[j] == kMap8) {
    encode_map<j, kLifts>(x, coding, map, words, to);
  } else if constexpr (is_scaled(kFormats[j])) {
    encode_minifloats<j, kLifts>(x, coding, words, to);
  } else {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v)
      store_state<j>(to, v * kWidth, load<Floats>(x + v * kWidth), words[v]);
  }
}

#endif

// Reads a stride of state j, whose elements begin at `from`.
template <int j>
OPT_FN void decode_state(const uint8_t* from, float scale, const QuantizationMap& map, Floats* x) {
  if constexpr (kFormats[j] == kMap8) {
    decode(from, scale, kSigned[j], map, x);
  } else if constexpr (is_scaled(kFormats[j])) {
    decode_minifloats<kFormats[j]>(from, scale, x);
  } else {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) x[v] = load_state<j>(from, v * kWidth);
  }
}
