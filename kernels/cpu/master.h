// Blocks of 16-bit parameters and what is kept beside them; master.cuh says what that is.

#if SPLIT && defined(__AVX2__) && !defined(__AVX512F__)
OPT_FN bool any_nan(__m256 x, __m256 y) {
  return _mm256_movemask_ps(_mm256_cmp_ps(x, y, _CMP_UNORD_Q)) != 0;
}

// Writes sixteen numbers below 2^16 in as many halves of words.
template <class T>
OPT_FN void store_halves(T* to, __m256i first, __m256i last) {
  store(to, _mm256_permute4x64_epi64(_mm256_packus_epi32(first, last), 0xd8));
}
#endif

// The first of a block's masters, as many as instructions join at once; returns how many.
OPT_FN int join_together(const PARAM* p, const Kept* kept, int n, float* masters) {
  int i = 0;
#if SPLIT && defined(__AVX512F__)
  for (; i + kWidth <= n; i += kWidth) {  // as completed() in master.cuh
    const Uints upper = read_halves(p + i) << 16;
    const Uints bits = upper + (Uints)((Ints)(read_halves(kept + i) << 16) >> 16);
    store(masters + i, (Ints)(bits ^ upper) < 0 ? upper : bits);
  }
#elif SPLIT && defined(__AVX2__)
  for (; i + 8 <= n; i += 8) {  // as completed() in master.cuh
    const __m256i upper = _mm256_slli_epi32(_mm256_cvtepu16_epi32(load<__m128i>(p + i)), 16);
    const __m256i bits = _mm256_add_epi32(upper, _mm256_cvtepi16_epi32(load<__m128i>(kept + i)));
    const __m256 borrows = _mm256_castsi256_ps(_mm256_xor_si256(bits, upper));
    const __m256 whole = _mm256_castsi256_ps(bits), zero = _mm256_castsi256_ps(upper);
    store(masters + i, _mm256_blendv_ps(whole, zero, borrows));
  }
#endif
  return i;
}

// The same, cut in two; may stop at a NaN.
OPT_FN int cut_together(PARAM* p, Kept* kept, const float* masters, int n) {
  int i = 0;
#if SPLIT && defined(__AVX512F__)
  for (; i + kWidth <= n; i += kWidth) {
    const Floats x = load<Floats>(masters + i);
    const Uints own = words_of(x);
    const Uints bits = x != x ? (own & kSignBit) | 0x7fc00000 : own;  // as master_bits()
    write_halves(p + i, (bits + 0x8000) >> 16);
    write_halves(kept + i, bits);
  }
#elif SPLIT && defined(__AVX2__)
  const __m256i half = _mm256_set1_epi32(0x8000), lower = _mm256_set1_epi32(0xffff);
  for (; i + 16 <= n; i += 16) {
    const __m256 first = load<__m256>(masters + i), last = load<__m256>(masters + i + 8);
    if (any_nan(first, last)) return i;
    const __m256i x = _mm256_castps_si256(first), y = _mm256_castps_si256(last);
    store_halves(p + i, _mm256_srli_epi32(_mm256_add_epi32(x, half), 16),
                 _mm256_srli_epi32(_mm256_add_epi32(y, half), 16));
    store_halves(kept + i, _mm256_and_si256(x, lower), _mm256_and_si256(y, lower));
  }
#endif
  return i;
}

// Parameters in a buffer of float32 become what they are with what is kept beside them.
OPT_FN void complete_elements(const Kept* kept, int i, int n, float* p) {
#if MASTER
  PARAM rounded[BLOCK];
  float values[BLOCK];
  i = write_together(rounded, kept, n);
  read_together(rounded, i, values);
  for (int k = 0; k < i; ++k) p[k] = float_bits(values[k]) == float_bits(p[k]) ? kept[k] : p[k];
#endif
#pragma omp simd
  for (int k = i; k < n; ++k) p[k] = completed(p[k], kept[k]);
}

// Reads a block of parameters into a buffer of float32, with what is kept beside them.
OPT_FN void read_params(const Tensor& t, int64_t first, int n, float* buffer) {
  const Kept* kept = KEEPS ? t.kept + first : nullptr;
  const int done = t.p_view ? 0 : join_together(t.p + first, kept, n, buffer);
  if (done < n) read_elements(t.p, t.p_view, first + done, n - done, buffer + done);
  if (KEEPS && done < n) complete_elements(kept, done, n, buffer);
}

// Writes such a buffer back.
OPT_FN void write_params(const Tensor& t, int64_t first, int64_t element, int n, const float* block,
                         uint32_t key) {
  int done = 0, kept = 0;
  if (t.p_view) {
    for_each_strided(t.p_view, first, n, [&](int i, int64_t offset) {
      store_param(t.p + offset, block[i], key, element + i);
    });
  } else {
    if (SPLIT) done = kept = cut_together(t.p + first, t.kept + first, block, n);
    if (!SPLIT && !STOCHASTIC) done = write_together(t.p + first, block, n);
#pragma omp simd
    for (int i = done; i < n; ++i) store_param(t.p + first + i, block[i], key, element + i);
  }
#pragma omp simd
  for (int i = kept; i < (KEEPS ? n : 0); ++i) store_kept(t.kept + first + i, block[i]);
}
