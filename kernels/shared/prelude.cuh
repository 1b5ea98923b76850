// Helpers shared by every kernel, on CPUs (C++17) and GPUs (CUDA, compiled by NVRTC).
// No CUDA header is needed: 16-bit floats are converted by their bit patterns.
#pragma once

#ifdef __CUDACC__
#define OPT_FN static __device__ __forceinline__
#define OPT_NOINLINE static __device__ __noinline__
using uint8_t = unsigned char;
using int16_t = short;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
#ifndef OPT_SHARED
#define OPT_SHARED(Type, name) __shared__ Type name
#endif
#else
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#define OPT_FN static inline __attribute__((always_inline))
#define OPT_NOINLINE static __attribute__((noinline))
#define OPT_MEMBER inline __attribute__((always_inline))
#endif

#if defined(__CUDACC__) || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
#define RULE_FMA_IS_EXACT 1
#else
#define RULE_FMA_IS_EXACT 0
#endif

// ---- bit patterns --------------------------------------------------------------------------

OPT_FN uint32_t float_bits(float value) {
#ifdef __CUDACC__
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

OPT_FN float bits_float(uint32_t bits) {
#ifdef __CUDACC__
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

// As vectors have them too.
OPT_FN uint32_t words_of(float value) { return float_bits(value); }
OPT_FN float floats_of(uint32_t bits) { return bits_float(bits); }

constexpr uint32_t kSignBit = 0x80000000u;
constexpr uint32_t kInfinityBits = 0x7f800000u;

OPT_FN bool is_finite(float value) {
#ifdef __CUDACC__
  return fabsf(value) <
         bits_float(kInfinityBits);  // one instruction: abs is part of the comparison
#else
  return (float_bits(value) & ~kSignBit) < kInfinityBits;
#endif
}

// What goes with a type of numbers: one float here, a vector of them in cpu/lanes.h.
template <class F>
struct Kind;
template <>
struct Kind<float> {
  using Mask = bool;  // of a comparison
  using Word = uint32_t;
  OPT_FN float splat(float x) { return x; }
  template <class Function>
  OPT_FN float each(float x, Function function) {
    return function(x);
  }
};

// ---- the functions of rule texts -----------------------------------------------------------
// Each is one IEEE operation with one rounding, so that every target computes the same bits.

namespace rule {

OPT_FN float fma(float a, float b, float c) {
#ifdef __CUDACC__
  return __fmaf_rn(a, b, c);
#elif RULE_FMA_IS_EXACT
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;  // a library call per element would be far slower than the memory
#endif
}

OPT_FN float sqrt(float a) {
#ifdef __CUDACC__
  return __fsqrt_rn(a);
#else
  return __builtin_sqrtf(a);
#endif
}

OPT_FN float abs(float a) { return bits_float(float_bits(a) & ~kSignBit); }
OPT_FN float where(bool condition, float a, float b) { return condition ? a : b; }
OPT_FN float sign(float a) { return where(a > 0.0f, 1.0f, where(a < 0.0f, -1.0f, a)); }

// As torch.maximum and torch.minimum, a NaN on either side wins.
OPT_FN float max(float a, float b) { return (a > b) | (a != a) ? a : b; }
OPT_FN float min(float a, float b) { return (a < b) | (a != a) ? a : b; }

}  // namespace rule

// ---- 16-bit floats -------------------------------------------------------------------------

struct float16 {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};

OPT_FN float to_float(float value) { return value; }
OPT_FN float to_float(bfloat16 value) { return bits_float(uint32_t(value.bits) << 16); }
OPT_FN float to_float(float16 value) {
#if defined(__CUDACC__) && !defined(OPTFACTORY_EMULATED)
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
#else
  const uint32_t magnitude = uint32_t(value.bits & 0x7fffu) << 13;
  // Scaling by 2^112 moves the exponent's bias from 15 to 127 and normalizes subnormals exactly.
  const uint32_t scaled = float_bits(bits_float(magnitude) * 0x1p112f);
  const uint32_t special = magnitude >= (0x7c00u << 13) ? kInfinityBits : 0u;
  return bits_float(scaled | special | uint32_t(value.bits & 0x8000u) << 16);
#endif
}

// Stores round to nearest, ties to even; this is the only rounding to the parameter's dtype.
OPT_FN void store(float* target, float value) { *target = value; }
OPT_FN void store(bfloat16* target, float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t nan = (bits >> 16) | 0x40u;
  target->bits = uint16_t((bits & ~kSignBit) > kInfinityBits ? nan : rounded);
}
OPT_FN void store(float16* target, float value) {
  const uint32_t sign = (float_bits(value) & kSignBit) >> 16;
  const uint32_t magnitude = float_bits(value) & ~kSignBit;
  // Below 2^-14 the addition of 0.5 lets the FPU round to the spacing of subnormals.
  const uint32_t subnormal = float_bits(bits_float(magnitude) + 0.5f) - float_bits(0.5f);
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t special = magnitude > kInfinityBits ? 0x7e00u : 0x7c00u;
  const uint32_t small = magnitude < (113u << 23) ? subnormal : normal;
  target->bits = uint16_t(sign | (magnitude >= (143u << 23) ? special : small));
}
