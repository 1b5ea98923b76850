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
  using Word = Uints;
  OPT_FN Floats splat(float x) { return x - Floats{}; }
  template <class Function>
  OPT_FN Floats each(Floats x, Function function) {
    for (int lane = 0; lane < kWidth; ++lane) x[lane] = function(x[lane]);
    return x;
  }
};

OPT_FN Ints bits_of(Floats x) { return (Ints)x; }
OPT_FN Floats floats_of(Ints bits) { return (Floats)bits; }
OPT_FN Uints words_of(Floats x) { return (Uints)x; }
OPT_FN Floats floats_of(Uints bits) { return (Floats)bits; }

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
// Of numbers that are not negative, whose patterns are ordered as they are.
OPT_FN Floats lesser(Floats a, Floats b) { return floats_of(smaller(bits_of(a), bits_of(b))); }
OPT_FN Ints greater(Ints a, Ints b) { return a > b ? a : b; }

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
