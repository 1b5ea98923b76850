// 8-bit state on GPUs: decoding and encoding kVector elements a thread, with the quantization maps
// in shared memory, and the reductions over threads that scales and norms need.

constexpr int kWarp = 32;
constexpr int kWarps = THREADS / kWarp;
constexpr uint32_t kAllLanes = 0xffffffffu;

using Stored = STATE;

#if QUANTIZED

struct Shared {
  SignedMap signed_map;
  UnsignedMap unsigned_map;
  uint32_t team_max[2][SLOTS][kWarps];
};

OPT_FN void load_maps(Shared& shared, const MapPointers& maps) {
  load_map(shared.signed_map, maps.words[0]);
  load_map(shared.unsigned_map, maps.words[1]);
  __syncthreads();
}

OPT_FN uint8_t zero_of(bool is_signed) { return is_signed ? kZeroCode : uint8_t(0); }

OPT_FN void decode_state(const Shared& shared, bool is_signed, const Pack<uint8_t>& codes,
                         float scale, float* x) {
  if (is_signed)
    decode_by(shared.signed_map, codes, scale, x);
  else
    decode_by(shared.unsigned_map, codes, scale, x);
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
  const float lowest = is_signed ? lowest_of(shared.signed_map) : 1.0f;
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

// `random`: of each element, if RANDOM_CODES.
OPT_FN void encode_state(const Shared& shared, bool is_signed, const float* x, float scale,
                         const uint32_t* random, Pack<uint8_t>& codes) {
  if (is_signed)
    encode_by(shared.signed_map, x, scale, random, codes);
  else
    encode_by(shared.unsigned_map, x, scale, random, codes);
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

struct Shared {};
OPT_FN void load_maps(Shared&, const MapPointers&) {}
OPT_FN Stored zero_of(bool) { return {}; }

OPT_FN void decode_state(const Shared&, bool, const Pack<Stored>& stored, float, float* x) {
  unpack(stored, x);
}

OPT_FN void encode_state(const Shared&, bool, const float* x, float, const uint32_t* random,
                         Pack<Stored>& stored) {
#if RANDOM_CODES
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    Stored value;
    store_random(&value, x[i], random[i] >> 16);
    set(stored, i, value);
  }
#else
  pack_floats(x, stored);
#endif
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
