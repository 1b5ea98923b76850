// From memory to what the rule sees, and back.

// A thread's elements as they are in memory.
struct Elements {
  Pack<PARAM> p;
  Pack<Kept> kept;
  Pack<GRAD> g;
  StatePack states[SLOTS];
  float scales[SLOTS];  // by which states are decoded that share some
};

// All reads come before the first use, so that they wait for memory together. Elements that the
// block does not have are zero: they then add nothing to norms and scales. Without kStates, state
// need not be in device memory.
template <bool kStates>
OPT_FN void read(const Bucket& bucket, const Work& work, const Place& at, Elements& e) {
  if (is_full(at)) {
    e.p = read_pack(work.p, at);
    if (KEEPS) e.kept = read_pack(work.kept, at);
    e.g = read_pack(work.g, at);
#pragma unroll
    for (int j = 0; kStates && j < STATES; ++j)
      read_state(j, work.states->state[j], at, e.states[j]);
  } else {
    const int64_t* p_view = bucket.p_view[work.tensor];
    const int64_t* g_view = bucket.g_view[work.tensor];
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const bool exists = position(at, i) < at.n;
      const int64_t element = at.first + position(at, i);
      set(e.p, i, exists ? work.p[offset_of(p_view, element)] : PARAM{});
      if (KEEPS) set(e.kept, i, exists ? work.kept[element] : Kept{});
      set(e.g, i, exists ? work.g[offset_of(g_view, element)] : GRAD{});
#pragma unroll
      for (int j = 0; kStates && j < STATES; ++j)
        read_one(j, work.states->state[j], element, i, exists, e.states[j]);
    }
  }
#pragma unroll
  for (int j = 0; kStates && j < STATES; ++j)
    e.scales[j] = is_scaled(kFormats[j]) && at.n > 0
                      ? work.states->absmax[j][TENSOR_WISE ? 0 : at.block]
                      : 0.0f;
}

OPT_FN void write(const Bucket& bucket, const Work& work, const Place& at, const Elements& e) {
  if (is_full(at)) {
    write_pack(work.p, at, e.p);
    if (KEEPS) write_pack(work.kept, at, e.kept);
#pragma unroll
    for (int j = 0; j < STATES; ++j) write_state(j, work.states->state[j], at, e.states[j]);
  } else {
    const int64_t* p_view = bucket.p_view[work.tensor];
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (position(at, i) >= at.n) continue;
      const int64_t element = at.first + position(at, i);
      work.p[offset_of(p_view, element)] = get(e.p, i);
      if (KEEPS) work.kept[element] = get(e.kept, i);
#pragma unroll
      for (int j = 0; j < STATES; ++j) write_one(j, work.states->state[j], element, i, e.states[j]);
    }
  }
#if QUANTIZED && !SCALES_FIRST
  if (at.lane == 0 && at.n > 0) {
#pragma unroll
    for (int j = 0; j < STATES; ++j)
      if (is_scaled(kFormats[j])) work.states->absmax[j][at.block] = e.scales[j];
  }
#endif
}

// A thread's elements as the rule sees them.
struct Values {
  float p[kVector];
  float g[kVector];
  float states[SLOTS][kVector];
};

// Divides gradients by the GradScaler's factor.
OPT_FN void unscale(const Bucket& bucket, float* g) {
  if (!bucket.grad_scale) return;
  const float factor = 1.0f / *bucket.grad_scale;
#pragma unroll
  for (int i = 0; i < kVector; ++i) g[i] *= factor;
}

OPT_FN void decode_operands(const Bucket& bucket, const Elements& e, Values& x) {
  unpack(e.p, x.p);
  unpack(e.g, x.g);
#if KEEPS
#pragma unroll
  for (int i = 0; i < kVector; ++i) x.p[i] = completed(x.p[i], get(e.kept, i));
#endif
  unscale(bucket, x.g);
}

OPT_FN void decode(const Shared& shared, const Bucket& bucket, const Elements& e, Values& x) {
  decode_operands(bucket, e, x);
#pragma unroll
  for (int j = 0; j < STATES; ++j) decode_state(shared, j, e.states[j], e.scales[j], x.states[j]);
}

OPT_FN void encode_params(const Work& work, const Place& at, const float* p, Elements& e) {
#if STOCHASTIC || SPLIT
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    PARAM stored;
    store_param(&stored, p[i], work.key, at.element + position(at, i));
    set(e.p, i, stored);
  }
#else
  pack_floats(p, e.p);
#endif
#if KEEPS
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    Kept kept;
    store_kept(&kept, p[i]);
    set(e.kept, i, kept);
  }
#endif
}

#if QUANTIZED
// The scale that a thread's elements of a state need; what the rule made of missing elements is not
// one of them.
OPT_FN uint32_t scale_of(const Shared& shared, const Place& at, int j, float* x) {
  if (!is_full(at)) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) x[i] = position(at, i) < at.n ? x[i] : 0.0f;
  }
  return is_scaled(kFormats[j]) ? own_scale(shared, j, x) : 0u;
}
#endif

// The random bits of a thread's elements, if DRAWS_FOR_STATES.
OPT_FN void draw(const Work& work, const Place& at, uint32_t* words) {
#if DRAWS_FOR_STATES
  const uint32_t key = codes_key(work.key);
#pragma unroll
  for (int i = 0; i < kVector; ++i) words[i] = random_bits(key, at.element + position(at, i));
#endif
}

// All threads of the block must call it; `turn` counts the calls.
OPT_FN void encode_states(Shared& shared, const Work& work, const Place& at, int turn, Values& x,
                          Elements& e) {
#if QUANTIZED
#if SCALES_FIRST
#pragma unroll
  for (int j = 0; j < STATES; ++j) {
#if CUTS_BLOCKS
    e.scales[j] = at.n > 0 ? work.new_scales[work.scales * j + at.block] : 0.0f;
#else
    e.scales[j] = work.new_scales[j];
#endif
  }
#else
  uint32_t scales[SLOTS];
#pragma unroll
  for (int j = 0; j < STATES; ++j) scales[j] = scale_of(shared, at, j, x.states[j]);
  max_over_team(shared, turn, scales);
#pragma unroll
  for (int j = 0; j < STATES; ++j) e.scales[j] = bits_float(scales[j]);
#endif
#endif
  uint32_t words[kVector];
  draw(work, at, words);
#pragma unroll
  for (int j = 0; j < STATES; ++j)
    encode_state(shared, j, x.states[j], e.scales[j], words, e.states[j]);
}

OPT_FN void read_gradient(const Bucket& bucket, const Work& work, const Place& at, float* g) {
  Pack<GRAD> pack;
  if (is_full(at)) {
    pack = read_pack(work.g, at);
  } else {
    const int64_t* g_view = bucket.g_view[work.tensor];
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const int64_t element = at.first + position(at, i);
      set(pack, i, position(at, i) < at.n ? work.g[offset_of(g_view, element)] : GRAD{});
    }
  }
  unpack(pack, g);
  unscale(bucket, g);
}
