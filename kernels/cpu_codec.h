// 8-bit state on CPUs: decoding and encoding one block of at most kMaxBlock elements.
// Every target computes the same codes and values; what differs is how many at a time.

#ifdef __AVX512VBMI__
#include <immintrin.h>
#endif

constexpr int kMaxBlock = 4096;

struct QuantizationMap {
  const float* values;    // [256]
  const uint8_t* planes;  // [4][256]: byte b of the pattern of values[code] is planes[b][code]
  const int32_t* keys;    // QuantizationMap.keys in optfactory/quantmap.py
};

#ifdef __AVX512VBMI__

// The 64 values of 64 codes, times a scale. Two permutations look one byte of all 64 up in
// registers; four gathers from memory would take more than twice as long.
OPT_FN void decode64(const uint8_t* codes, __m512 scale, const uint8_t* planes, float* x) {
  // Unpacking interleaves within 128-bit lanes: transposing the codes first undoes that.
  const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
  const __m512i code = _mm512_permutexvar_epi32(order, _mm512_loadu_si512(codes));
  const __mmask64 upper = _mm512_movepi8_mask(code);
  __m512i bytes[4];
  for (int b = 0; b < 4; ++b) {
    const uint8_t* plane = planes + 256 * b;
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
  const __m512i patterns[4] = {
      _mm512_unpacklo_epi16(low01, low23), _mm512_unpackhi_epi16(low01, low23),
      _mm512_unpacklo_epi16(high01, high23), _mm512_unpackhi_epi16(high01, high23)};
  for (int quarter = 0; quarter < 4; ++quarter)
    _mm512_storeu_ps(x + 16 * quarter,
                     _mm512_mul_ps(_mm512_castsi512_ps(patterns[quarter]), scale));
}

#endif

OPT_FN void decode(const uint8_t* codes, float scale, const QuantizationMap& map, int n, float* x) {
  int i = 0;
#ifdef __AVX512VBMI__
  for (; i + 64 <= n; i += 64) decode64(codes + i, _mm512_set1_ps(scale), map.planes, x + i);
#endif
#pragma omp simd
  for (int k = i; k < n; ++k) x[k] = map.values[codes[k]] * scale;
}

// The greatest magnitudes among the positive and the negative values. Patterns of floats of one
// sign are ordered as integers, which vectorizes without assumptions about NaN.
OPT_FN void extremes(const float* x, int n, float* positive, float* negative) {
  int32_t high = 0, low = 0;
#pragma omp simd reduction(max : high, low)
  for (int i = 0; i < n; ++i) {
    const int32_t bits = int32_t(float_bits(x[i]));
    const int32_t mirrored = int32_t(float_bits(x[i]) ^ kSignBit);
    high = high < bits ? bits : high;
    low = low < mirrored ? mirrored : low;
  }
  *positive = bits_float(uint32_t(high));
  *negative = bits_float(uint32_t(low));
}

// The scale that these values need; see optfactory/codec.py for the rules.
OPT_FN float scale_of(const float* x, bool is_signed, const QuantizationMap& map, int n) {
  float positive, negative;
  extremes(x, n, &positive, &negative);
  return block_scale(positive, negative, is_signed && !BITSANDBYTES ? -map.values[0] : 1.0f);
}

// Writes the codes of values under a scale that is at least their own.
OPT_FN void encode(const float* x, float scale, bool is_signed, const QuantizationMap& map, int n,
                   uint8_t* codes) {
  // A block of zeros has scale 0; dividing by 1 instead gives the code of zero.
  const Divisor divisor = make_divisor(scale > 0.0f ? scale : 1.0f);
  const float smallest = smallest_magnitude(is_signed, map.values);
  const int32_t* keys = map.keys;
  int32_t wide[kMaxBlock];
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    wide[i] = code_of(x[i], divide(x[i], divisor), scale, is_signed, smallest, map.values, keys);
  }
#pragma omp simd
  for (int i = 0; i < n; ++i) codes[i] = uint8_t(wide[i]);
}
