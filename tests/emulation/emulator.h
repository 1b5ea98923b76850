// The part of CUDA C++ that kernels use, for a C++17 compiler: put before a kernel's source.
// Threads are fibers of runtime.cpp. Every function here has the type and the rounding of CUDA's,
// and nothing else is declared, so that a source that compiles here uses nothing unexpected.
#pragma once

#include "runtime.h"

#define __device__
#define __global__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)

// __shared__ alone stays undefined: only this macro can poison and guard an object.
#define OPT_SHARED(Type, name)                                              \
  static ::emulator::Shared<Type> name##_in_shared_memory(#name, __LINE__); \
  Type& name = name##_in_shared_memory.object()

// ---- vector types --------------------------------------------------------------------------

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace emulator {

// The line that calls a function, as its last parameter's default. Nothing converts to it, so that
// CUDA's optional `width`, which is not supported, does not compile.
class Line {
 public:
  static constexpr Line here(int line = __builtin_LINE()) { return Line(line); }
  const int number;

 private:
  explicit constexpr Line(int line) : number(line) {}
};

template <typename To, typename From>
inline To bits_as(From from) {
  static_assert(sizeof(To) >= sizeof(From) && __is_trivially_copyable(To), "no bits may be lost");
  To to{};
  __builtin_memcpy(&to, &from, sizeof from);
  return to;
}

template <typename T>
inline T warp(WarpOperation operation, unsigned mask, T value, unsigned source_lane, Line line) {
  const EmulatedWord word = bits_as<EmulatedWord>(value);
  const EmulatedWord result = emulator_warp(operation, mask, word, source_lane, line.number);
  T to;
  __builtin_memcpy(&to, &result, sizeof to);
  return to;
}

template <typename T>
inline void check_alignment(const T* address, Line line) {
  if (reinterpret_cast<EmulatedWord>(address) % alignof(T) != 0) {
    emulator_fail(line.number, "misaligned address %p: this access needs a multiple of %d",
                  static_cast<const void*>(address), int(alignof(T)));
  }
}

inline SharedObject* shared_objects = nullptr;

template <typename T>
class Shared {
 public:
  Shared(const char* name, int line) : entry_{name, before_, sizeof(T), nullptr} {
    static_assert(__is_trivially_constructible(T), "CUDA constructs nothing in shared memory");
    static_assert(sizeof(T) <= 48 * 1024, "a block has 48 KiB of static shared memory");
    emulator_register_shared(&entry_, &shared_objects);
  }
  T& object() { return *reinterpret_cast<T*>(object_); }

 private:
  SharedObject entry_;
  alignas(kGuardBytes) unsigned char before_[kGuardBytes];
  unsigned char object_[sizeof(T)];
  unsigned char behind_[kGuardBytes];
};

}  // namespace emulator

// ---- barriers and warps --------------------------------------------------------------------

#define EMULATOR_LINE ::emulator::Line line = ::emulator::Line::here()

inline void __syncthreads(EMULATOR_LINE) { emulator_block_barrier(line.number); }

inline void __syncwarp(unsigned mask = 0xffffffffu, EMULATOR_LINE) {
  emulator_warp(WarpOperation::kSyncWarp, mask, 0, 0, line.number);
}

#define EMULATOR_SHUFFLES(T)                                                                       \
  inline T __shfl_sync(unsigned mask, T value, int source, EMULATOR_LINE) {                        \
    return ::emulator::warp(WarpOperation::kShuffle, mask, value, source & 31, line);              \
  }                                                                                                \
  inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask, EMULATOR_LINE) {                 \
    const unsigned source = (threadIdx.x ^ lane_mask) & 31;                                        \
    return ::emulator::warp(WarpOperation::kShuffleXor, mask, value, source, line);                \
  }                                                                                                \
  inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, EMULATOR_LINE) {               \
    const unsigned lane = threadIdx.x & 31, source = lane + (delta & 31);                          \
    return ::emulator::warp(WarpOperation::kShuffleDown, mask, value, source > 31 ? lane : source, \
                            line);                                                                 \
  }
EMULATOR_SHUFFLES(int)
EMULATOR_SHUFFLES(unsigned)
EMULATOR_SHUFFLES(long long)
EMULATOR_SHUFFLES(unsigned long long)
EMULATOR_SHUFFLES(float)
EMULATOR_SHUFFLES(double)
#undef EMULATOR_SHUFFLES

inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATOR_LINE) {
  return unsigned(emulator_warp(WarpOperation::kBallot, mask, predicate != 0, 0, line.number));
}
inline int __any_sync(unsigned mask, int predicate, EMULATOR_LINE) {
  return int(emulator_warp(WarpOperation::kAny, mask, predicate != 0, 0, line.number));
}
inline int __all_sync(unsigned mask, int predicate, EMULATOR_LINE) {
  return int(emulator_warp(WarpOperation::kAll, mask, predicate != 0, 0, line.number));
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value, EMULATOR_LINE) {
  return unsigned(emulator_warp(WarpOperation::kReduceMax, mask, value, 0, line.number));
}
inline int __reduce_max_sync(unsigned mask, int value, EMULATOR_LINE) {
  return int(__reduce_max_sync(mask, unsigned(value) ^ 0x80000000u, line) ^ 0x80000000u);
}

// ---- arithmetic ----------------------------------------------------------------------------

inline unsigned __float_as_uint(float value) { return ::emulator::bits_as<unsigned>(value); }
inline float __uint_as_float(unsigned bits) { return ::emulator::bits_as<float>(bits); }
inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float __fmaf_rz(float a, float b, float c) {
  // The exact result is the sum of two doubles, unless they overflow: the product is exact.
  const double product = double(a) * b, sum = product + c, other = sum - product;
  const double rest = (product - (sum - other)) + (c - other);
  const float nearest = __builtin_fmaf(a, b, c);
  const double beyond = (nearest - sum) - rest;  // exact as far as its sign goes
  const bool rounded_away = nearest > 0.0f ? beyond > 0.0 : beyond < 0.0;
  const unsigned bits = __float_as_uint(nearest);
  return rounded_away && nearest != 0.0f ? __uint_as_float(bits - 1) : nearest;
}
inline float __fsqrt_rn(float a) { return __builtin_sqrtf(a); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float sqrt(float a) { return __builtin_sqrtf(a); }
inline double sqrt(double a) { return __builtin_sqrt(a); }
inline float __saturatef(float a) { return a > 0.0f ? (a < 1.0f ? a : 1.0f) : 0.0f; }
inline float fabsf(float a) { return __builtin_fabsf(a); }

// Bit 3 of a selector's digits is ignored: NVRTC masks it, unlike the instruction prmt.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const EmulatedWord bytes = EmulatedWord(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned chosen = selector >> (4 * i) & 7;
    result |= unsigned(bytes >> (8 * chosen) & 0xff) << (8 * i);
  }
  return result;
}

#define EMULATOR_MIN_MAX(T, A, B) \
  inline T min(A a, B b) {        \
    const T x = a, y = b;         \
    return x < y ? x : y;         \
  }                               \
  inline T max(A a, B b) {        \
    const T x = a, y = b;         \
    return x > y ? x : y;         \
  }
EMULATOR_MIN_MAX(int, int, int)
EMULATOR_MIN_MAX(unsigned, unsigned, unsigned)
EMULATOR_MIN_MAX(unsigned, int, unsigned)
EMULATOR_MIN_MAX(unsigned, unsigned, int)
EMULATOR_MIN_MAX(long long, long long, long long)
EMULATOR_MIN_MAX(unsigned long long, unsigned long long, unsigned long long)
#undef EMULATOR_MIN_MAX

// As fminf and fmaxf: a NaN loses, and -0 is less than +0.
#define EMULATOR_FLOAT_MIN_MAX(T)                                                                \
  inline T min(T a, T b) { return b != b || a < b || (a == b && __builtin_signbit(a)) ? a : b; } \
  inline T max(T a, T b) { return b != b || a > b || (a == b && __builtin_signbit(b)) ? a : b; }
EMULATOR_FLOAT_MIN_MAX(float)
EMULATOR_FLOAT_MIN_MAX(double)
#undef EMULATOR_FLOAT_MIN_MAX

inline float fminf(float a, float b) { return min(a, b); }
inline float fmaxf(float a, float b) { return max(a, b); }

// ---- memory --------------------------------------------------------------------------------

#define EMULATOR_ACCESSES(T)                              \
  inline T __ldg(const T* source, EMULATOR_LINE) {        \
    ::emulator::check_alignment(source, line);            \
    return *source;                                       \
  }                                                       \
  inline T __ldcs(const T* source, EMULATOR_LINE) {       \
    ::emulator::check_alignment(source, line);            \
    return *source;                                       \
  }                                                       \
  inline void __stcs(T* target, T value, EMULATOR_LINE) { \
    ::emulator::check_alignment(target, line);            \
    *target = value;                                      \
  }
EMULATOR_ACCESSES(unsigned char)
EMULATOR_ACCESSES(unsigned short)
EMULATOR_ACCESSES(int)
EMULATOR_ACCESSES(unsigned)
EMULATOR_ACCESSES(long long)
EMULATOR_ACCESSES(unsigned long long)
EMULATOR_ACCESSES(float)
EMULATOR_ACCESSES(double)
EMULATOR_ACCESSES(float2)
EMULATOR_ACCESSES(float4)
EMULATOR_ACCESSES(uint2)
EMULATOR_ACCESSES(uint4)
#undef EMULATOR_ACCESSES
