// 8-bit state on GPUs: decoding and encoding kVector elements a thread, with the quantization maps
// in shared memory, and the reductions over threads that scales and norms need.

constexpr int kWarp = 32;
constexpr int kWarps = THREADS / kWarp;
constexpr uint32_t kAllLanes = 0xffffffffu;

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

template <Format kFormat>
OPT_FN void decode_minifloats(const Pack<uint8_t>& codes, float scale, float* x) {
#pragma unroll
  for (int i = 0; i < kVector; ++i)
    x[i] = minifloat_value<kFormat, float>(to_bits(get(codes, i))) * scale;
}

OPT_FN void decode_codes(const Shared& shared, int j, const Pack<uint8_t>& codes, float scale,
                         float* x) {
  if (kFormats[j] == kE4m3)
    decode_minifloats<kE4m3>(codes, scale, x);
  else if (kFormats[j] == kE5m3)
    decode_minifloats<kE5m3>(codes, scale, x);
  else if (kSigned[j])
    decode_by(shared.signed_map, codes, scale, x);
  else
    decode_by(shared.unsigned_map, codes, scale, x);
}

// The scale that a thread's own elements would need, as a bit pattern: scales are not negative, so
// that the patterns are ordered as the numbers are, and the team's scale is the greatest.
OPT_FN uint32_t own_scale(const Shared& shared, int j, const float* x) {
  float positive = 0.0f, negative = 0.0f;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    positive = fmaxf(positive, x[i]);
    if (kSigned[j]) negative = fmaxf(negative, -x[i]);
  }
  if (kFormats[j] != kMap8) return float_bits(fmaxf(positive, negative) / largest_of(kFormats[j]));
  const float lowest = kSigned[j] ? lowest_of(shared.signed_map) : 1.0f;
  return float_bits(block_scale(positive, negative, lowest));
}

// Replaces each state's value by the greatest of the team. All threads of the block must call it;
// `turn` counts the calls, so that two calls in a row use different memory and one barrier is
// enough.
OPT_FN void max_over_team(Shared& shared, int turn, uint32_t* values) {
#pragma unroll
  for (int j = 0; j < STATES; ++j) {
    if (!is_scaled(kFormats[j])) continue;
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

OPT_FN Divisor minifloat_divisor(float scale) {
  Divisor divisor = make_divisor(scale > 0.0f ? scale : 1.0f, true);
  divisor.reciprocal *= kQuotientsBy;
  return divisor;
}

// The code of a number by its scale.
template <Format kFormat>
OPT_FN uint32_t code_by(int j, float x, const Divisor& divisor, uint32_t word) {
  using M = Minifloat<kFormat>;
  const float y = divide(x, divisor, true);
  const uint32_t random = bits_of_state<M::kCut>(word, j);
  const uint32_t found = minifloat_code<kFormat>(M::kHasSign ? fabsf(y) : y, random);
  const uint32_t size = found < M::kLast ? found : M::kLast;
  const uint32_t sign = 1u << (bits_of_format(kFormat) - 1);
  return M::kHasSign && y < 0.0f && size > 0u ? size | sign : size;  // zero has no sign
}

template <Format kFormat>
OPT_FN void encode_minifloats(int j, const float* x, float scale, const uint32_t* words,
                              Pack<uint8_t>& codes) {
  const Divisor divisor = minifloat_divisor(scale);
#pragma unroll
  for (int i = 0; i < kVector; ++i)
    set(codes, i, uint8_t(code_by<kFormat>(j, x[i], divisor, words[i])));
}

// Of 4 bits: kVector elements in a word, the first of a byte in its upper half.
OPT_FN int place_of_half(int i) { return 4 * (i ^ 1); }

template <Format kFormat>
OPT_FN void decode_halves(const StatePack& state, float scale, float* x) {
#pragma unroll
  for (int i = 0; i < kVector; ++i)
    x[i] = minifloat_value<kFormat, float>(state.words[0] >> place_of_half(i) & 15u) * scale;
}

template <Format kFormat>
OPT_FN void encode_halves(int j, const float* x, float scale, const uint32_t* words,
                          StatePack& state) {
  const Divisor divisor = minifloat_divisor(scale);
  state.words[0] = 0u;
#pragma unroll
  for (int i = 0; i < kVector; ++i)
    state.words[0] |= code_by<kFormat>(j, x[i], divisor, words[i]) << place_of_half(i);
}

OPT_FN void encode_map(const Shared& shared, int j, const float* x, float scale,
                       const uint32_t* words, Pack<uint8_t>& codes) {
  uint32_t random[kVector];
#pragma unroll
  for (int i = 0; RANDOM_CODES && i < kVector; ++i) random[i] = words_of_state(words[i], j);
  if (kSigned[j])
    encode_by(shared.signed_map, x, scale, random, codes);
  else
    encode_by(shared.unsigned_map, x, scale, random, codes);
}

OPT_FN void encode_codes(const Shared& shared, int j, const float* x, float scale,
                         const uint32_t* words, Pack<uint8_t>& codes) {
  if (kFormats[j] == kE4m3)
    encode_minifloats<kE4m3>(j, x, scale, words, codes);
  else if (kFormats[j] == kE5m3)
    encode_minifloats<kE5m3>(j, x, scale, words, codes);
  else
    encode_map(shared, j, x, scale, words, codes);
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

#endif

// ---- a thread's elements of state j -----------------------------------------------------------

OPT_FN void decode_state(const Shared& shared, int j, const StatePack& state, float scale,
                         float* x) {
  if (kFormats[j] == kFloat32) return unpack(pack_of<float>(state), x);
  if (kFormats[j] == kBfloat16) return unpack(pack_of<bfloat16>(state), x);
#if QUANTIZED
  if (kFormats[j] == kE2m1) return decode_halves<kE2m1>(state, scale, x);
  if (kFormats[j] == kE3m1) return decode_halves<kE3m1>(state, scale, x);
  decode_codes(shared, j, pack_of<uint8_t>(state), scale, x);
#endif
}

// `words`: of each element, for all states, if DRAWS_FOR_STATES.
OPT_FN void encode_state(const Shared& shared, int j, const float* x, float scale,
                         const uint32_t* words, StatePack& state) {
  if (kFormats[j] == kFloat32) {
    Pack<float> pack;
    pack_floats(x, pack);
    return set_pack(state, pack);
  }
#if ANY_SHORT_FLOAT
  if (kFormats[j] == kBfloat16) {
    Pack<bfloat16> pack;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      bfloat16 value;
      store_random(&value, x[i], half_words_of_state(words[i], j));
      set(pack, i, value);
    }
    return set_pack(state, pack);
  }
#endif
#if QUANTIZED
  if (kFormats[j] == kE2m1) return encode_halves<kE2m1>(j, x, scale, words, state);
  if (kFormats[j] == kE3m1) return encode_halves<kE3m1>(j, x, scale, words, state);
  Pack<uint8_t> codes;
  encode_codes(shared, j, x, scale, words, codes);
  set_pack(state, codes);
#endif
}

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
