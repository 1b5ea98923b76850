// Conversions, for which compilers find no single instruction by themselves.

OPT_FN Ints widened(Bytes x) {
#if defined(__AVX512F__)
  return (Ints)_mm512_cvtepu8_epi32((__m128i)x);
#elif defined(__AVX2__)
  return (Ints)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((int64_t)x));
#else
  return __builtin_convertvector(x, Ints);
#endif
}

// The same of several vectors, which lie one behind the other.
template <int kCount>
OPT_FN void widen(const uint8_t* from, Ints* x) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  // Shuffles within 128 bits take a third of the time of conversions.
  const __m256i first = _mm256_setr_epi32(0xffffff00, 0xffffff01, 0xffffff02, 0xffffff03,
                                          0xffffff04, 0xffffff05, 0xffffff06, 0xffffff07);
  const __m256i second = _mm256_add_epi32(first, _mm256_set1_epi32(8));
#pragma GCC unroll 16
  for (int v = 0; v < kCount; v += 2) {
    const __m256i both = _mm256_broadcastsi128_si256(load<__m128i>(from + v * kWidth));
    x[v] = (Ints)_mm256_shuffle_epi8(both, first);
    x[v + 1] = (Ints)_mm256_shuffle_epi8(both, second);
  }
#else
#pragma GCC unroll 16
  for (int v = 0; v < kCount; ++v) x[v] = widened(load<Bytes>(from + v * kWidth));
#endif
}

// Converts the first elements of an array, as many as instructions do at once; returns how many.
template <class T>
OPT_FN int read_together(const T*, int, float*) {
  return 0;
}
template <class T>
OPT_FN int write_together(T*, const float*, int) {
  return 0;
}
#if defined(__AVX512F__)
// As wide as what loads them later: a load does not wait for a store that holds all of it.
OPT_FN Uints read_halves(const void* from) {
  return (Uints)_mm512_cvtepu16_epi32(load<__m256i>(static_cast<const uint8_t*>(from)));
}
OPT_FN void write_halves(void* to, Uints x) {
  store(static_cast<uint8_t*>(to), _mm512_cvtepi32_epi16((__m512i)x));
}
OPT_FN int read_together(const bfloat16* from, int n, float* x) {
  int i = 0;
  for (; i + kWidth <= n; i += kWidth) store(x + i, read_halves(from + i) << 16);
  return i;
}
// As `store` in prelude.cuh, in the upper half of each lane.
OPT_FN Uints rounded_to_bfloat16(Floats x) {
  const Uints bits = words_of(x);
  return x != x ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1);
}
OPT_FN int write_together(bfloat16* to, const float* x, int n) {
  int i = 0;
  for (; i + kWidth <= n; i += kWidth)
    write_halves(to + i, rounded_to_bfloat16(load<Floats>(x + i)) >> 16);
  return i;
}
OPT_FN int read_together(const float16* from, int n, float* x) {
  int i = 0;
  for (; i + kWidth <= n; i += kWidth) store(x + i, _mm512_cvtph_ps(load<__m256i>(from + i)));
  return i;
}
OPT_FN int write_together(float16* to, const float* x, int n) {
  int i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    const Floats value = load<Floats>(x + i);
    // The instruction keeps a NaN's upper bits, where `store` has one NaN for each sign.
    const Floats one = floats_of(value != value ? words_of(value) & 0xffc00000 : words_of(value));
    store(to + i, _mm512_cvtps_ph((__m512)one, _MM_FROUND_TO_NEAREST_INT));
  }
  return i;
}
#elif defined(__AVX2__)
OPT_FN int read_together(const bfloat16* from, int n, float* x) {
  int i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256i upper = _mm256_cvtepu16_epi32(load<__m128i>(from + i));
    store(x + i, _mm256_slli_epi32(upper, 16));
  }
  return i;
}
// As `store` in prelude.cuh, in the upper half of each lane.
OPT_FN __m256i rounded_to_bfloat16(__m256i bits) {
  const __m256i odd = _mm256_srli_epi32(_mm256_slli_epi32(bits, 15), 31);
  const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i nan = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256 value = _mm256_castsi256_ps(bits);
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(sum, nan, is_nan);
}
OPT_FN int write_together(bfloat16* to, const float* x, int n) {
  int i = 0;
  for (; i + 16 <= n; i += 16) {
    const __m256i low = _mm256_srli_epi32(rounded_to_bfloat16(load<__m256i>(x + i)), 16);
    const __m256i high = _mm256_srli_epi32(rounded_to_bfloat16(load<__m256i>(x + i + 8)), 16);
    store(to + i, _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8));
  }
  return i;
}
#endif
#if defined(__AVX2__) && defined(__F16C__) && !defined(__AVX512F__)
OPT_FN int read_together(const float16* from, int n, float* x) {
  int i = 0;
  for (; i + 8 <= n; i += 8) store(x + i, _mm256_cvtph_ps(load<__m128i>(from + i)));
  return i;
}
OPT_FN int write_together(float16* to, const float* x, int n) {
  int i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256 value = load<__m256>(x + i);
    // The instruction keeps a NaN's upper bits, where `store` has one NaN for each sign.
    const __m256 is_nan = _mm256_cmp_ps(value, value, _CMP_UNORD_Q);
    const __m256 low = _mm256_and_ps(is_nan, _mm256_castsi256_ps(_mm256_set1_epi32(0x3fffff)));
    const __m256 one = _mm256_andnot_ps(low, value);
    store(to + i, _mm256_cvtps_ph(one, _MM_FROUND_TO_NEAREST_INT));
  }
  return i;
}
#endif

// sum + x * x; the product of two floats is exact in double, so that a fused sum is the same.
OPT_FN Doubles plus_square(Doubles sum, HalfFloats x) {
#if defined(__AVX512F__)
  const __m512d wide = _mm512_cvtps_pd((__m256)x);
  return (Doubles)_mm512_fmadd_pd(wide, wide, (__m512d)sum);
#elif defined(__AVX2__) && defined(__FMA__)
  const __m256d wide = _mm256_cvtps_pd((__m128)x);
  return (Doubles)_mm256_fmadd_pd(wide, wide, (__m256d)sum);
#else
  const Doubles wide = __builtin_convertvector(x, Doubles);
  return sum + wide * wide;
#endif
}
