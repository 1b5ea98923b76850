// Blocks of 16-bit parameters and what is kept beside them; master.cuh says what that is.

#if SPLIT && defined(__AVX2__)
// Eight patterns of masters: as master_bits() of one.
OPT_FN __m256i master_bits(const float* from) {
  const __m256 x = load<__m256>(from);
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i sign = _mm256_and_si256(bits, _mm256_set1_epi32(int32_t(kSignBit)));
  const __m256i nan = _mm256_or_si256(sign, _mm256_set1_epi32(0x7fc00000));
  return _mm256_blendv_epi8(bits, nan, is_nan);
}

// Writes sixteen numbers below 2^16 in as many halves of words.
template <class T>
OPT_FN void store_halves(T* to, __m256i first, __m256i last) {
  store(to, _mm256_permute4x64_epi64(_mm256_packus_epi32(first, last), 0xd8));
}
#endif

// The first of a block's parameters, as many as instructions store at once; returns how many.
OPT_FN int store_together(PARAM* to, const float* x, int n) {
#if STOCHASTIC
  return 0;
#elif !SPLIT
  return write_together(to, x, n);
#elif defined(__AVX2__)
  const __m256i half = _mm256_set1_epi32(0x8000);
  int i = 0;
  for (; i + 16 <= n; i += 16) {
    const __m256i first = _mm256_srli_epi32(_mm256_add_epi32(master_bits(x + i), half), 16);
    const __m256i last = _mm256_srli_epi32(_mm256_add_epi32(master_bits(x + i + 8), half), 16);
    store_halves(to + i, first, last);
  }
  return i;
#else
  return 0;
#endif
}

// What is to be kept beside a block's parameters, which have these values.
OPT_FN void keep_elements(Kept* to, const float* x, int n) {
  int i = 0;
#if SPLIT && defined(__AVX2__)
  const __m256i lower = _mm256_set1_epi32(0xffff);
  for (; i + 16 <= n; i += 16)
    store_halves(to + i, _mm256_and_si256(master_bits(x + i), lower),
                 _mm256_and_si256(master_bits(x + i + 8), lower));
#endif
#pragma omp simd
  for (int k = i; k < n; ++k) store_kept(to + k, x[k]);
}

// Parameters in a buffer of float32 become what they are with what is kept beside them.
OPT_FN void complete_elements(const Kept* kept, int n, float* p) {
  int i = 0;
#if SPLIT && defined(__AVX2__)
  for (; i + 8 <= n; i += 8) {
    const __m256i upper = load<__m256i>(p + i);
    const __m256i bits = _mm256_add_epi32(upper, _mm256_cvtepi16_epi32(load<__m128i>(kept + i)));
    const __m256 borrows = _mm256_castsi256_ps(_mm256_xor_si256(bits, upper));
    store(p + i, _mm256_blendv_ps(_mm256_castsi256_ps(bits), load<__m256>(p + i), borrows));
  }
#elif MASTER
  PARAM rounded[BLOCK];
  float values[BLOCK];
  i = write_together(rounded, kept, n);
  read_together(rounded, i, values);
  for (int k = 0; k < i; ++k) p[k] = float_bits(values[k]) == float_bits(p[k]) ? kept[k] : p[k];
#endif
#pragma omp simd
  for (int k = i; k < n; ++k) p[k] = completed(p[k], kept[k]);
}
