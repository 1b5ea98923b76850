// 8-bit state on GPUs: decoding and encoding kVector elements a thread, with the tables of the
// quantization maps in shared memory, and the reductions over threads that scales and norms need.

constexpr int kWarp = 32;
constexpr int kWarps = THREADS / kWarp;
constexpr uint32_t kAllLanes = 0xffffffffu;

// One table per map and not per state: [0] of the signed map, [1] of the unsigned one.
struct MapPointers {
  const float* values[2];
  const int32_t* keys[2];  // QuantizationMap.keys in optfactory/state/quantmap.py
};

// Key range of QuantizationMap.keys: the upper halves of the patterns of 2^-23 and of 1.
constexpr int32_t kLowestKey = 104 << 7;
constexpr int32_t kHighestKey = 127 << 7;
constexpr int32_t kKeyCount = kHighestKey - kLowestKey + 1;
constexpr float kSmallestKeyed = 0x1p-23f;

// The code of the map value nearest to y in [-1, 1], ties to even; see QuantizationMap.keys.
// Magnitudes below `smallest`, which is kSmallestKeyed or more, are taken for it.
OPT_FN int32_t nearest_code(float y, bool is_signed, float smallest, const int32_t* keys) {
  const int32_t bits = int32_t(float_bits(y));
  const int32_t magnitude = bits & 0x7fffffff, least = int32_t(float_bits(smallest));
  const int32_t clamped = magnitude > least ? magnitude : least;
  const int32_t sign = is_signed ? bits >> 31 : 0;  // all ones if y is negative
  const int32_t entry = keys[(clamped >> 16) - kLowestKey + (sign & kKeyCount)];
  return (entry + ((clamped ^ sign) & 0xffff)) >> 16;
}

// bitsandbytes moves a code by one if its value's sign is not that of the number.
OPT_FN int32_t fix_sign(int32_t code, float x, float value) {
  const bool differs = ((float_bits(x) ^ float_bits(value)) & kSignBit) != 0;
  return differs ? (code + (x > 0.0f ? 1 : 255)) & 255 : code;
}

// What `code_of` takes as the smallest magnitude of a map. A second moment that is not zero must
// not become zero, because its root divides the step: it takes at least the smallest value.
OPT_FN float smallest_magnitude(bool is_signed, const float* values) {
  return FLOORS && !is_signed ? values[1] : kSmallestKeyed;
}

// The code of x, y being x divided by the scale.
OPT_FN int32_t code_of(float x, float y, float scale, bool is_signed, float smallest,
                       const float* values, const int32_t* keys) {
  const int32_t code = nearest_code(y, is_signed, smallest, keys);
#if BITSANDBYTES
  if (is_signed) return fix_sign(scale > 0.0f ? code : 0, x, values[scale > 0.0f ? code : 0]);
#endif
  return is_signed || !FLOORS || x > 0.0f ? code : 0;
}

#if QUANTIZED

using Stored = uint8_t;

constexpr int kSignedKeys = ANY_SIGNED ? 2 * kKeyCount : 0;
constexpr int kUnsignedKeys = ANY_UNSIGNED ? kKeyCount : 0;  // no negative values

struct Shared {
  float values[2][256];
  int32_t keys[kSignedKeys + kUnsignedKeys];
  uint32_t team_max[2][STATES][kWarps];
};

OPT_FN void load_maps(Shared& shared, const MapPointers& maps) {
  for (int i = threadIdx.x; i < 512; i += THREADS)
    shared.values[i / 256][i % 256] = maps.values[i / 256][i % 256];
  for (int i = threadIdx.x; i < kSignedKeys; i += THREADS) shared.keys[i] = maps.keys[0][i];
  for (int i = threadIdx.x; i < kUnsignedKeys; i += THREADS)
    shared.keys[kSignedKeys + i] = maps.keys[1][i];
  __syncthreads();
}

OPT_FN uint8_t zero_of(bool is_signed) { return is_signed ? kZeroCode : uint8_t(0); }

OPT_FN void decode_state(const Shared& shared, bool is_signed, const Pack<uint8_t>& codes,
                         float scale, float* x) {
  const float* values = shared.values[is_signed ? 0 : 1];
#pragma unroll
  for (int i = 0; i < kVector; ++i) x[i] = values[get(codes, i)] * scale;
}

// The scale that a thread's own elements would need, as a bit pattern: scales are not negative, so
// that the patterns are ordered as the numbers are, and the team's scale is the greatest.
OPT_FN uint32_t own_scale(const Shared& shared, bool is_signed, const float* x) {
  float positive = 0.0f, negative = 0.0f;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    positive = fmaxf(positive, x[i]);
    if (is_signed) negative = fmaxf(negative, -x[i]);
  }
  const float lowest = is_signed && !BITSANDBYTES ? -shared.values[0][0] : 1.0f;
  return float_bits(block_scale(positive, negative, lowest));
}

// Replaces each state's value by the greatest of the team. All threads of the block must call it;
// `turn` counts the calls, so that two calls in a row use different memory and one barrier is
// enough.
OPT_FN void max_over_team(Shared& shared, int turn, uint32_t* values) {
#pragma unroll
  for (int j = 0; j < STATES; ++j) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    if (kTeam >= kWarp) {
      values[j] = __reduce_max_sync(kAllLanes, values[j]);
      continue;
    }
#endif
#pragma unroll
    for (int lanes = 1; lanes < (kTeam < kWarp ? kTeam : kWarp); lanes *= 2) {
      const uint32_t other = __shfl_xor_sync(kAllLanes, values[j], lanes);
      values[j] = values[j] > other ? values[j] : other;
    }
  }
  if (kTeam <= kWarp) return;
  const int warp = threadIdx.x / kWarp, first_warp = threadIdx.x / kTeam * (kTeam / kWarp);
  if (threadIdx.x % kWarp == 0) {
#pragma unroll
    for (int j = 0; j < STATES; ++j) shared.team_max[turn & 1][j][warp] = values[j];
  }
  __syncthreads();
#pragma unroll
  for (int j = 0; j < STATES; ++j) {
    for (int w = 0; w < kTeam / kWarp; ++w) {
      const uint32_t other = shared.team_max[turn & 1][j][first_warp + w];
      values[j] = values[j] > other ? values[j] : other;
    }
  }
}

OPT_FN void encode_state(const Shared& shared, bool is_signed, const float* x, float scale,
                         Pack<uint8_t>& codes) {
  // A block of zeros has scale 0; dividing by 1 instead gives the code of zero.
  const Divisor divisor = make_divisor(scale > 0.0f ? scale : 1.0f, are_computed(is_signed));
  const float* values = shared.values[is_signed ? 0 : 1];
  const int32_t* keys = shared.keys + (is_signed ? 0 : kSignedKeys);
  const float smallest = smallest_magnitude(is_signed, values);
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const float y = divide(x[i], divisor, are_computed(is_signed));
    set(codes, i, uint8_t(code_of(x[i], y, scale, is_signed, smallest, values, keys)));
  }
}

// The greatest of each state's values over all threads, which the first thread gets.
OPT_FN void max_over_threads(Shared& shared, int turn, uint32_t* values) {
#pragma unroll
  for (int j = 0; j < STATES; ++j) {
#pragma unroll
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
      const uint32_t other = __shfl_xor_sync(kAllLanes, values[j], lanes);
      values[j] = values[j] > other ? values[j] : other;
    }
    if (threadIdx.x % kWarp == 0) shared.team_max[turn & 1][j][threadIdx.x / kWarp] = values[j];
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int j = 0; j < STATES; ++j) {
    for (int warp = 0; warp < kWarps; ++warp) {
      const uint32_t other = shared.team_max[turn & 1][j][warp];
      values[j] = values[j] > other ? values[j] : other;
    }
  }
}

#else

using Stored = float;

struct Shared {};
OPT_FN void load_maps(Shared&, const MapPointers&) {}
OPT_FN float zero_of(bool) { return 0.0f; }

OPT_FN void decode_state(const Shared&, bool, const Pack<float>& stored, float, float* x) {
  unpack(stored, x);
}

OPT_FN void encode_state(const Shared&, bool, const float* x, float, Pack<float>& stored) {
  pack_floats(x, stored);
}

#endif

// ---- sums over all threads, in a fixed order ----------------------------------------------------

struct SumBuffer {
  double values[2][kWarps];
};

OPT_FN double sum_over_warp(double value) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2)
    value += __shfl_xor_sync(kAllLanes, value, lanes);
  return value;
}

// The sums of a and of b over all threads, which the first thread gets.
OPT_FN void sum_over_threads(SumBuffer& buffer, double* a, double* b) {
  const double sums[2] = {sum_over_warp(*a), sum_over_warp(*b)};
  __syncthreads();  // the first thread may still read the sums of the call before
  if (threadIdx.x % kWarp == 0) {
    buffer.values[0][threadIdx.x / kWarp] = sums[0];
    buffer.values[1][threadIdx.x / kWarp] = sums[1];
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  *a = *b = 0.0;
  for (int warp = 0; warp < kWarps; ++warp) {
    *a += buffer.values[0][warp];
    *b += buffer.values[1][warp];
  }
}
