// Tables of eight entries in registers, and what computing codes needs beside them.

// Whether eight entries can be looked up in registers, and floats multiplied and added at once. x86
// processors without AVX2 could, but would have to shift lane by lane: they are told to in tests.
#if defined(__AVX512BW__) || defined(__aarch64__) || defined(TEST_VECTORS_OF_FOUR) || \
    (defined(__AVX2__) && !defined(__AVX512F__) && defined(__FMA__))
#define LOOKS_UP_IN_REGISTERS 1
#else
#define LOOKS_UP_IN_REGISTERS 0
#endif

// Eight entries, repeated if there is room.
#if !LOOKS_UP_IN_REGISTERS
using Table = const float*;
OPT_FN Table table_of(const float* entries) { return entries; }
#elif defined(__AVX2__)
using Table = Floats;
OPT_FN Table table_of(const float* entries) { return load<Floats>(entries); }
#else
struct Table {
  Floats low, high;
};
OPT_FN Table table_of(const float* entries) {
  return {load<Floats>(entries), load<Floats>(entries + kWidth)};
}
#endif

// table[index % 8] for each lane.
OPT_FN Floats lookup(const Table& table, Ints index) {
#if !LOOKS_UP_IN_REGISTERS
  return gather(table, index & 7);
#elif defined(__AVX512BW__)
  return (Floats)_mm512_permutexvar_ps((__m512i)index, (__m512)table);
#elif defined(__AVX2__)
  return (Floats)_mm256_permutevar8x32_ps((__m256)table, (__m256i)index);
#elif defined(__clang__)
  const Ints bytes = (index & 7) * 0x04040404 + 0x03020100;
  return (Floats)vqtbl2q_u8({{(uint8x16_t)table.low, (uint8x16_t)table.high}}, (uint8x16_t)bytes);
#else
  return __builtin_shuffle(table.low, table.high, index);
#endif
}

// (max(half, least) - least) * factor / 2^16 of the upper half of each lane.
template <int kLeast, int kFactor>
OPT_FN Ints scaled_halves(Ints x) {
#if defined(__AVX512BW__)
  const __m512i least = _mm512_set1_epi32(kLeast << 16 | 0xffff);
  const __m512i above = _mm512_subs_epu16((__m512i)x, least);
  return (Ints)_mm512_srli_epi32(_mm512_mulhi_epu16(above, _mm512_set1_epi32(kFactor << 16)), 16);
#elif defined(__AVX2__)
  const __m256i least = _mm256_set1_epi32(kLeast << 16 | 0xffff);
  const __m256i above = _mm256_subs_epu16((__m256i)x, least);
  return (Ints)_mm256_srli_epi32(_mm256_mulhi_epu16(above, _mm256_set1_epi32(kFactor << 16)), 16);
#else
  const Ints half = (Ints)((Uints)x >> 16);
  return (greater(half, splat(kLeast)) - kLeast) * kFactor >> 16;
#endif
}

// x >> by for each lane, 0 where `by` is not in 0..31; x is not negative.
OPT_FN Ints shifted_right(Ints x, Ints by) {
#if defined(__AVX512BW__)
  return (Ints)_mm512_srlv_epi32((__m512i)x, (__m512i)by);
#elif defined(__AVX2__)
  return (Ints)_mm256_srlv_epi32((__m256i)x, (__m256i)by);
#else
  return (by & ~31) == 0 ? x >> (by & 31) : Ints{};
#endif
}

// x << by for each lane, `by` in 0..31.
OPT_FN Uints shifted_left(Uints x, Ints by) {
#if defined(__AVX512F__)
  return (Uints)_mm512_sllv_epi32((__m512i)x, (__m512i)by);
#elif defined(__AVX2__)
  return (Uints)_mm256_sllv_epi32((__m256i)x, (__m256i)by);
#else
  return x << (Uints)by;
#endif
}

// x where `like` is positive, -x where it is negative; 0 may stand for either if `like` is 0.
OPT_FN Ints with_sign(Ints x, Ints like) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  return (Ints)_mm256_sign_epi32((__m256i)x, (__m256i)like);
#else
  const Ints sign = like >> 31;
  return (x ^ sign) - sign;
#endif
}
