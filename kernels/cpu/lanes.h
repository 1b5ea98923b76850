// Vectors of the widest kind that the processor has, with the functions of rule texts.
//
// Operators, comparisons and ?: are those of GCC's and Clang's vector extension. What it lacks is
// written with intrinsics where they matter, and lane by lane elsewhere. Each lane computes the
// same bits on every instruction set.

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kWidth)));
typedef int32_t Ints __attribute__((vector_size(4 * kWidth)));
typedef uint32_t Uints __attribute__((vector_size(4 * kWidth)));
typedef uint8_t Bytes __attribute__((vector_size(kWidth)));

// Half as many floats, and as many doubles.
constexpr int kDoubles = kWidth / 2;
typedef float HalfFloats __attribute__((vector_size(4 * kDoubles)));
typedef double Doubles __attribute__((vector_size(8 * kDoubles)));

OPT_FN Ints splat(int32_t x) { return x - Ints{}; }

template <>
struct Kind<Floats> {
  using Mask = Ints;  // all ones where true
  OPT_FN Floats splat(float x) { return x - Floats{}; }
  template <class Function>
  OPT_FN Floats each(Floats x, Function function) {
    for (int lane = 0; lane < kWidth; ++lane) x[lane] = function(x[lane]);
    return x;
  }
};

OPT_FN Ints bits_of(Floats x) { return (Ints)x; }
OPT_FN Floats floats_of(Ints bits) { return (Floats)bits; }

OPT_FN Ints is_finite(Floats x) { return (bits_of(x) & 0x7fffffff) < int32_t(kInfinityBits); }

template <class Vector, class T>
OPT_FN Vector load(const T* from) {
  Vector x;
  std::memcpy(&x, from, sizeof x);
  return x;
}
template <class Vector, class T>
OPT_FN void store(T* to, Vector x) {
  std::memcpy(to, &x, sizeof x);
}

// 0, 1, 2, ...
OPT_FN Ints lane_numbers() {
  Ints numbers;
  for (int lane = 0; lane < kWidth; ++lane) numbers[lane] = lane;
  return numbers;
}

// table[index] for each lane; indices may be negative.
#if defined(__AVX512F__)
OPT_FN Floats gather(const float* table, Ints index) {
  return (Floats)_mm512_i32gather_ps((__m512i)index, table, 4);
}
OPT_FN Ints gather(const int32_t* table, Ints index) {
  return (Ints)_mm512_i32gather_epi32((__m512i)index, table, 4);
}
#elif defined(__AVX2__)
OPT_FN Floats gather(const float* table, Ints index) {
  return (Floats)_mm256_i32gather_ps(table, (__m256i)index, 4);
}
OPT_FN Ints gather(const int32_t* table, Ints index) {
  return (Ints)_mm256_i32gather_epi32(table, (__m256i)index, 4);
}
#else
OPT_FN Floats gather(const float* table, Ints index) {
  Floats x;
  for (int lane = 0; lane < kWidth; ++lane) x[lane] = table[index[lane]];
  return x;
}
OPT_FN Ints gather(const int32_t* table, Ints index) {
  Ints x;
  for (int lane = 0; lane < kWidth; ++lane) x[lane] = table[index[lane]];
  return x;
}
#endif

OPT_FN Ints smaller(Ints a, Ints b) { return a < b ? a : b; }
OPT_FN Ints greater(Ints a, Ints b) { return a > b ? a : b; }

// Whether eight entries can be looked up in registers, and floats multiplied and added at once. x86
// processors without AVX2 could, but would have to shift lane by lane: they are told to in tests.
#if defined(__AVX512BW__) || defined(__aarch64__) || defined(TEST_VECTORS_OF_FOUR) || \
    (defined(__AVX2__) && !defined(__AVX512F__) && defined(__FMA__))
#define LOOKS_UP_IN_REGISTERS 1

// Eight entries, repeated if there is room.
#if defined(__AVX2__)
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
#if defined(__AVX512BW__)
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

// x where `like` is positive, -x where it is negative; 0 may stand for either if `like` is 0.
OPT_FN Ints with_sign(Ints x, Ints like) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  return (Ints)_mm256_sign_epi32((__m256i)x, (__m256i)like);
#else
  const Ints sign = like >> 31;
  return (x ^ sign) - sign;
#endif
}
#else
#define LOOKS_UP_IN_REGISTERS 0
#endif

// The greatest of all lanes; T is int32_t or uint32_t.
template <class Vector>
OPT_FN auto greatest(Vector x) -> decltype(x[0] + 0) {
  auto most = x[0] + 0;
  for (int lane = 1; lane < kWidth; ++lane) most = most < x[lane] ? x[lane] : most;
  return most;
}
#if defined(__AVX512F__)
OPT_FN int32_t greatest(Ints x) { return _mm512_reduce_max_epi32((__m512i)x); }
OPT_FN uint32_t greatest(Uints x) { return _mm512_reduce_max_epu32((__m512i)x); }
#elif defined(__AVX2__)
OPT_FN int32_t greatest(Ints x) {
  __m128i most =
      _mm_max_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
  most = _mm_max_epi32(most, _mm_shuffle_epi32(most, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(most, _mm_shuffle_epi32(most, 0xb1)));
}
OPT_FN uint32_t greatest(Uints x) {
  __m128i most =
      _mm_max_epu32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
  most = _mm_max_epu32(most, _mm_shuffle_epi32(most, 0x4e));
  return uint32_t(_mm_cvtsi128_si32(_mm_max_epu32(most, _mm_shuffle_epi32(most, 0xb1))));
}
#endif

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
#if defined(__AVX2__)
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
#if defined(__AVX2__) && defined(__F16C__)
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

// ---- the functions of rule texts -----------------------------------------------------------

namespace rule {

OPT_FN Floats fma(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (Floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  Floats x;
  for (int lane = 0; lane < kWidth; ++lane) x[lane] = fma(a[lane], b[lane], c[lane]);
  return x;
#endif
}

OPT_FN Floats sqrt(Floats a) {
#if defined(__AVX512F__)
  return (Floats)_mm512_sqrt_ps((__m512)a);
#elif defined(__AVX2__)
  return (Floats)_mm256_sqrt_ps((__m256)a);
#elif defined(__aarch64__)
  return (Floats)vsqrtq_f32((float32x4_t)a);
#else
  Floats x;
  for (int lane = 0; lane < kWidth; ++lane) x[lane] = sqrt(a[lane]);
  return x;
#endif
}

OPT_FN Floats abs(Floats a) { return floats_of(bits_of(a) & 0x7fffffff); }
OPT_FN Floats where(Ints condition, Floats a, Floats b) { return condition ? a : b; }
OPT_FN Floats sign(Floats a) {
  const Floats one = Kind<Floats>::splat(1.0f);
  return where(a > 0.0f, one, where(a < 0.0f, -one, a));
}
OPT_FN Floats max(Floats a, Floats b) { return (a > b) | (a != a) ? a : b; }
OPT_FN Floats min(Floats a, Floats b) { return (a < b) | (a != a) ? a : b; }

}  // namespace rule
