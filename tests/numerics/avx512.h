// The AVX-512 instructions that kernels/cpu uses, element by element: `g++ -include` it, and
// kernels for processors with AVX-512 run on those without. SHIM_VBMI adds the instructions on
// bytes.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512DQ__ 1
#define __AVX512VL__ 1
#ifdef SHIM_VBMI
#define __AVX512VBMI__ 1
#endif

namespace shim {
template <class E>
struct V {
  E e[64 / sizeof(E)];
};
template <class E, class X>
static inline V<E> get(const X& x) {
  V<E> v;
  static_assert(sizeof(X) == 64, "");
  std::memcpy(&v, &x, 64);
  return v;
}
template <class X, class E>
static inline X put(const V<E>& v) {
  X x;
  std::memcpy(&x, &v, 64);
  return x;
}
#define EACH(E) for (size_t i = 0; i < 64 / sizeof(E); ++i)
static inline __m512i cvtepu8_epi32(__m128i a) {
  uint8_t b[16];
  std::memcpy(b, &a, 16);
  V<int32_t> r;
  EACH(int32_t) r.e[i] = b[i];
  return put<__m512i>(r);
}
static inline __m512 cvtph_ps(__m256i a) {
  const __m256 halves[2] = {_mm256_cvtph_ps(_mm256_castsi256_si128(a)),
                            _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1))};
  __m512 x;
  std::memcpy(&x, halves, 64);
  return x;
}
static inline __m256i cvtps_ph(__m512 a) {
  __m256 halves[2];
  std::memcpy(halves, &a, 64);
  return _mm256_set_m128i(_mm256_cvtps_ph(halves[1], _MM_FROUND_TO_NEAREST_INT),
                          _mm256_cvtps_ph(halves[0], _MM_FROUND_TO_NEAREST_INT));
}
static inline __m512d cvtps_pd(__m256 a) {
  float b[8];
  std::memcpy(b, &a, 32);
  V<double> r;
  EACH(double) r.e[i] = b[i];
  return put<__m512d>(r);
}
static inline __m512d fmadd_pd(__m512d a, __m512d b, __m512d c) {
  auto x = get<double>(a), y = get<double>(b), z = get<double>(c);
  EACH(double) x.e[i] = __builtin_fma(x.e[i], y.e[i], z.e[i]);
  return put<__m512d>(x);
}
static inline __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) {
  auto x = get<float>(a), y = get<float>(b), z = get<float>(c);
  EACH(float) x.e[i] = __builtin_fmaf(x.e[i], y.e[i], z.e[i]);
  return put<__m512>(x);
}
static inline __m512 sqrt_ps(__m512 a) {
  auto x = get<float>(a);
  EACH(float) x.e[i] = __builtin_sqrtf(x.e[i]);
  return put<__m512>(x);
}
static inline __m512i i32gather_epi32(__m512i a, const void* p, int) {
  auto x = get<int32_t>(a);
  EACH(int32_t) x.e[i] = ((const int32_t*)p)[x.e[i]];
  return put<__m512i>(x);
}
static inline __m512 i32gather_ps(__m512i a, const void* p, int) {
  auto x = get<int32_t>(a);
  V<float> r;
  EACH(float) r.e[i] = ((const float*)p)[x.e[i]];
  return put<__m512>(r);
}
static inline __m512i load(const void* p) {
  __m512i x;
  std::memcpy(&x, p, 64);
  return x;
}
static inline void store(void* p, __m512i x) { std::memcpy(p, &x, 64); }
static inline __mmask64 movepi8_mask(__m512i a) {
  auto x = get<uint8_t>(a);
  __mmask64 m = 0;
  EACH(uint8_t) m |= (__mmask64)(x.e[i] >> 7) << i;
  return m;
}
static inline __m512i mulhi_epu16(__m512i a, __m512i b) {
  auto x = get<uint16_t>(a), y = get<uint16_t>(b);
  EACH(uint16_t) x.e[i] = uint16_t((uint32_t(x.e[i]) * y.e[i]) >> 16);
  return put<__m512i>(x);
}
static inline __m512i subs_epu16(__m512i a, __m512i b) {
  auto x = get<uint16_t>(a), y = get<uint16_t>(b);
  EACH(uint16_t) x.e[i] = x.e[i] > y.e[i] ? x.e[i] - y.e[i] : 0;
  return put<__m512i>(x);
}
static inline __m512i permutexvar_epi32(__m512i n, __m512i a) {
  auto x = get<uint32_t>(n), y = get<uint32_t>(a);
  EACH(uint32_t) x.e[i] = y.e[x.e[i] & 15];
  return put<__m512i>(x);
}
static inline __m512 permutexvar_ps(__m512i n, __m512 a) {
  return (__m512)permutexvar_epi32(n, (__m512i)a);
}
static inline __m512i permutexvar_epi8(__m512i n, __m512i a) {
  auto x = get<uint8_t>(n), y = get<uint8_t>(a);
  EACH(uint8_t) x.e[i] = y.e[x.e[i] & 63];
  return put<__m512i>(x);
}
static inline __m512i permutex2var_epi8(__m512i a, __m512i n, __m512i b) {
  auto x = get<uint8_t>(n), y = get<uint8_t>(a), z = get<uint8_t>(b);
  EACH(uint8_t) x.e[i] = x.e[i] & 64 ? z.e[x.e[i] & 63] : y.e[x.e[i] & 63];
  return put<__m512i>(x);
}
static inline int32_t reduce_max_epi32(__m512i a) {
  auto x = get<int32_t>(a);
  int32_t m = x.e[0];
  EACH(int32_t) m = m < x.e[i] ? x.e[i] : m;
  return m;
}
static inline uint32_t reduce_max_epu32(__m512i a) {
  auto x = get<uint32_t>(a);
  uint32_t m = x.e[0];
  EACH(uint32_t) m = m < x.e[i] ? x.e[i] : m;
  return m;
}
static inline __m512i set1_epi32(int32_t a) {
  V<int32_t> r;
  EACH(int32_t) r.e[i] = a;
  return put<__m512i>(r);
}
template <class... A>
static inline __m512i set_epi32(A... a) {
  int32_t b[16] = {a...};
  V<int32_t> r;
  EACH(int32_t) r.e[i] = b[15 - i];
  return put<__m512i>(r);
}
static inline __m512i srli_epi32(__m512i a, unsigned n) {
  auto x = get<uint32_t>(a);
  EACH(uint32_t) x.e[i] = n > 31 ? 0 : x.e[i] >> n;
  return put<__m512i>(x);
}
static inline __m512i srlv_epi32(__m512i a, __m512i n) {
  auto x = get<uint32_t>(a), y = get<uint32_t>(n);
  EACH(uint32_t) x.e[i] = y.e[i] > 31 ? 0 : x.e[i] >> y.e[i];
  return put<__m512i>(x);
}
static inline __m512i sllv_epi32(__m512i a, __m512i n) {
  auto x = get<uint32_t>(a), y = get<uint32_t>(n);
  EACH(uint32_t) x.e[i] = y.e[i] > 31 ? 0 : x.e[i] << y.e[i];
  return put<__m512i>(x);
}
template <class E>
static inline __m512i unpack(__m512i a, __m512i b, int high) {
  auto x = get<E>(a), y = get<E>(b);
  V<E> r;
  const int n = 16 / sizeof(E);
  for (int l = 0; l < 4; ++l)
    for (int i = 0; i < n / 2; ++i) {
      const int from = l * n + (high ? n / 2 : 0) + i;
      r.e[l * n + 2 * i] = x.e[from];
      r.e[l * n + 2 * i + 1] = y.e[from];
    }
  return put<__m512i>(r);
}
static inline __m512i mask_blend_epi32(__mmask16 m, __m512i a, __m512i b) {
  auto x = get<int32_t>(a), y = get<int32_t>(b);
  EACH(int32_t) x.e[i] = m >> i & 1 ? y.e[i] : x.e[i];
  return put<__m512i>(x);
}
static inline __m512i slli_epi32(__m512i a, unsigned n) {
  auto x = get<uint32_t>(a);
  EACH(uint32_t) x.e[i] = n < 32 ? x.e[i] << n : 0;
  return put<__m512i>(x);
}
static inline __m512i set1_epi16(int16_t a) {
  V<int16_t> r;
  EACH(int16_t) r.e[i] = a;
  return put<__m512i>(r);
}
static inline __m512i maddubs_epi16(__m512i a, __m512i b) {
  auto x = get<uint8_t>(a);
  auto y = get<int8_t>(b);
  V<int16_t> r;
  EACH(int16_t) r.e[i] = int16_t(x.e[2 * i] * y.e[2 * i] + x.e[2 * i + 1] * y.e[2 * i + 1]);
  return put<__m512i>(r);
}
static inline __m512i cvtepu16_epi32(__m256i a) {
  uint16_t b[16];
  std::memcpy(b, &a, 32);
  V<int32_t> r;
  EACH(int32_t) r.e[i] = b[i];
  return put<__m512i>(r);
}
template <class From, class To>
static inline __m256i narrowed(__m512i a) {
  auto x = get<From>(a);
  To b[32 / sizeof(To)];
  EACH(From) b[i] = To(x.e[i]);
  __m256i r;
  std::memcpy(&r, b, 32);
  return r;
}
static inline __m512i mask_blend_epi8(__mmask64 m, __m512i a, __m512i b) {
  auto x = get<uint8_t>(a), y = get<uint8_t>(b);
  EACH(uint8_t) x.e[i] = m >> i & 1 ? y.e[i] : x.e[i];
  return put<__m512i>(x);
}
}  // namespace shim
#define _mm512_cvtepu8_epi32 shim::cvtepu8_epi32
#define _mm512_cvtps_pd shim::cvtps_pd
#define _mm512_cvtph_ps shim::cvtph_ps
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph(x, rounding) shim::cvtps_ph(x)
#define _mm512_fmadd_pd shim::fmadd_pd
#define _mm512_fmadd_ps shim::fmadd_ps
#define _mm512_sqrt_ps shim::sqrt_ps
#undef _mm512_i32gather_epi32
#undef _mm512_i32gather_ps
#define _mm512_i32gather_epi32 shim::i32gather_epi32
#define _mm512_i32gather_ps shim::i32gather_ps
#define _mm512_load_si512 shim::load
#define _mm512_loadu_si512 shim::load
#define _mm512_storeu_si512 shim::store
#define _mm512_movepi8_mask shim::movepi8_mask
#define _mm512_mulhi_epu16 shim::mulhi_epu16
#define _mm512_subs_epu16 shim::subs_epu16
#define _mm512_permutexvar_epi32 shim::permutexvar_epi32
#define _mm512_permutexvar_ps shim::permutexvar_ps
#define _mm512_permutexvar_epi8 shim::permutexvar_epi8
#define _mm512_permutex2var_epi8 shim::permutex2var_epi8
#define _mm512_reduce_max_epi32 shim::reduce_max_epi32
#define _mm512_reduce_max_epu32 shim::reduce_max_epu32
#define _mm512_set1_epi32 shim::set1_epi32
#define _mm512_set_epi32 shim::set_epi32
#undef _mm512_srli_epi32
#define _mm512_srli_epi32 shim::srli_epi32
#define _mm512_sllv_epi32 shim::sllv_epi32
#define _mm512_srlv_epi32 shim::srlv_epi32
#define _mm512_mask_blend_epi32 shim::mask_blend_epi32
#undef _mm512_slli_epi32
#define _mm512_slli_epi32 shim::slli_epi32
#define _mm512_set1_epi16 shim::set1_epi16
#define _mm512_maddubs_epi16 shim::maddubs_epi16
#define _mm512_cvtepu16_epi32 shim::cvtepu16_epi32
#define _mm512_cvtepi32_epi16 shim::narrowed<uint32_t, uint16_t>
#define _mm512_cvtepi16_epi8 shim::narrowed<uint16_t, uint8_t>
#define _mm512_unpacklo_epi8(a, b) shim::unpack<uint8_t>(a, b, 0)
#define _mm512_unpackhi_epi8(a, b) shim::unpack<uint8_t>(a, b, 1)
#define _mm512_unpacklo_epi16(a, b) shim::unpack<uint16_t>(a, b, 0)
#define _mm512_unpackhi_epi16(a, b) shim::unpack<uint16_t>(a, b, 1)
#define _mm512_mask_blend_epi8 shim::mask_blend_epi8
