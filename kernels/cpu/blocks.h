// One block of a tensor: where its elements are while it is worked on, and the work.

struct Place {  // of a block in its tensor
  int64_t first;
  int64_t block;
  int n;
  int64_t element;  // number of the first one in the whole tensor, if NUMBERS_ELEMENTS
  int64_t part;     // of a block, if CUTS_BLOCKS
};

// ---- operands --------------------------------------------------------------------------------

// Copies of what cannot be worked on where it is: 16-bit and strided tensors, and blocks whose end
// is not the end of a stride.
struct Buffers {
  alignas(64) float p[BLOCK];
  alignas(64) float g[BLOCK];
  alignas(64) uint8_t states[STATES][4 * BLOCK];
};

// Whole strides of float32 parameters and gradients, and of states as they are stored.
struct Operands {
  float* p;
  const float* g;
  uint8_t* states[STATES];
};

OPT_FN bool is_whole(int n) { return n % kStride == 0; }
OPT_FN int whole(int n) { return (n + kStride - 1) / kStride * kStride; }

// The elements themselves if they are float32 in memory, row-major and whole strides, else null.
OPT_FN float* in_place(float* base, const int64_t* view, const Place& at) {
  return view || !is_whole(at.n) ? nullptr : base + at.first;
}
template <class T>
OPT_FN float* in_place(T*, const int64_t*, const Place&) {
  return nullptr;
}

OPT_FN Operands operands(const Tensor& t, const Place& at, Buffers& buffers) {
  Operands o = {in_place(t.p, t.p_view, at), in_place(const_cast<GRAD*>(t.g), t.g_view, at), {}};
  const int padded = whole(at.n);
  if (!o.p) {
    read_params(t, at.first, at.n, o.p = buffers.p);
    for (int i = at.n; i < padded; ++i) buffers.p[i] = 0.0f;
  }
  if (!o.g) {
    read_elements(t.g, t.g_view, at.first, at.n, buffers.g);
    for (int i = at.n; i < padded; ++i) buffers.g[i] = 0.0f;
    o.g = buffers.g;
  }
  for (int j = 0; j < STATES; ++j) {
    uint8_t* const own = t.state[j] + bytes_of(j, at.first);
    o.states[j] = is_whole(at.n) ? own : buffers.states[j];
    if (is_whole(at.n)) continue;
    const int64_t bytes = bytes_of(j, at.n), padding = bytes_of(j, padded) - bytes;
    std::memcpy(buffers.states[j], own, bytes);
    std::memset(buffers.states[j] + bytes, zero_byte(j), padding);
  }
  return o;
}

// Writes what was worked on in a copy; codes are written by `flush`.
OPT_FN void write_back(const Tensor& t, const Place& at, uint32_t key, const Operands& o,
                       const Buffers& buffers) {
  if (o.p == buffers.p) write_params(t, at.first, at.element, at.n, o.p, key);
  for (int j = 0; !QUANTIZED && j < STATES; ++j)
    if (o.states[j] == buffers.states[j])
      std::memcpy(t.state[j] + bytes_of(j, at.first), o.states[j], bytes_of(j, at.n));
}

// ---- what a block's work needs ---------------------------------------------------------------

// The numbers of a tensor's step. Loops read copies of their own, of operands too: stores of codes
// might change what a pointer leads to.
struct Numbers {
  Scalars scalars;
  float factor;  // of gradients
  float ratio;   // of the tensor
  float size;    // of the step, with the ratio where rules do not read that
};

// What the blocks of a chunk share.
struct Step {
  Numbers numbers;
  uint32_t key;  // of random bits, if NUMBERS_ELEMENTS
  QuantizationMap maps[STATES];
};

OPT_FN Step make_step(const Bucket& bucket, const Chunk& chunk) {
  const Scalars& scalars = bucket.scalars[bucket.tensors[chunk.tensor].scalars];
  const float ratio = HAS_RATIO ? bucket.ratios[chunk.tensor] : 1.0f;
  const float factor = CLIPS ? bucket.factors[chunk.tensor] : 1.0f;
  const float size = -scalars.step_size * (RATIO_OF_GRADIENT ? 1.0f : ratio);
  const int64_t number = bucket.tensors[chunk.tensor].number;
  const uint32_t key = NUMBERS_ELEMENTS ? random_key(number, scalars) : 0;
  Step step = {{scalars, factor, ratio, size}, key, {}};
  for (int j = 0; j < STATES; ++j) step.maps[j] = bucket.maps[j];
  return step;
}

// ---- states ----------------------------------------------------------------------------------

// A stride of each state as float32.
struct Strides {
  Floats x[STATES][kVectors];
};

OPT_FN void read_states(const Step& step, const Operands& o, const float* scales, int i,
                        Strides& states) {
  for_each_state(OPT_STATE(j) {
    decode_state<j>(o.states[j] + bytes_of(j, i), scales[j], step.maps[j], states.x[j]);
  });
}

// The scales by which a block's states are decoded.
OPT_FN void read_scales(const Tensor& t, const Place& at, float* scales) {
  for (int j = 0; j < STATES; ++j)
    scales[j] = is_scaled(kFormats[j]) ? t.absmax[j][TENSOR_WISE ? 0 : at.block] : 0.0f;
}

#if QUANTIZED

// A block's new states that have yet to be stored: the next block is updated meanwhile, because
// the one waits for divisions and the other for the look-up of codes.
struct Pending {
  alignas(64) float x[STATES][BLOCK];
  Coding codings[STATES];
  uint8_t* codes[STATES];  // where they go
  int n = 0;               // 0 if nothing is pending
  Noise noise;

  // Whether it can be encoded beside the update of another whole block.
  OPT_MEMBER bool is_usual() const {
    bool lifts = false;
    for (const Coding& coding : codings) lifts |= coding.lifts();
    return n == BLOCK && !lifts;
  }
};

// Zeroes the elements of a block that are not finite in all states, and finds the extremes anew.
OPT_NOINLINE void repair(float (*x)[BLOCK], int n, Magnitudes* found) {
  for (int j = 0; j < STATES; ++j) found[j] = {};
  for (int i = 0; i < n; ++i) {
    float states[STATES];
    for (int j = 0; j < STATES; ++j) states[j] = x[j][i];
    const bool keep = are_finite(states);
    for (int j = 0; j < STATES; ++j) {
      const float kept = x[j][i] = keep ? states[j] : 0.0f;
      uint32_t& most = kept < 0.0f ? found[j].negative : found[j].positive;
      const uint32_t magnitude = float_bits(kept) & ~kSignBit;
      most = most < magnitude ? magnitude : most;
    }
  }
}

// Extremes of the states in a buffer; elements that are not finite have become zero there.
OPT_FN void find_magnitudes(const Extremes* extremes, float (*x)[BLOCK], int n, Magnitudes* found) {
  bool usual = true;
  for (int j = 0; j < STATES; ++j) {
    found[j] = magnitudes(extremes[j], kSigned[j]);
    usual = usual && found[j].are_finite() && (kSigned[j] || found[j].negative == 0);
  }
  if (!usual) repair(x, n, found);
}

// Writes the codes of a stride of all states, from element i of the block on.
template <bool kLifts>
OPT_FN void write_stride(const Step& step, const Pending& from, const Coding* codings, int i,
                         uint8_t* const* codes) {
  Uints words[kVectors];
  draw(from.noise, i, words);
  for_each_state(OPT_STATE(j) {
    encode_state<j, kLifts>(from.x[j] + i, codings[j], step.maps[j], words, codes[j]);
  });
}

// Writes the codes of a block.
OPT_FN void flush(const Step& step, Pending& pending) {
  for (int i = 0; i < pending.n; i += kStride) {
    uint8_t tails[STATES][4 * kStride];
    uint8_t* codes[STATES];
    const int left = pending.n - i;
    for (int j = 0; j < STATES; ++j)
      codes[j] = left < kStride ? tails[j] : pending.codes[j] + bytes_of(j, i);
    write_stride<true>(step, pending, pending.codings, i, codes);
    for (int j = 0; left < kStride && j < STATES; ++j)
      std::memcpy(pending.codes[j] + bytes_of(j, i), tails[j], bytes_of(j, left));
  }
  pending.n = 0;
}

#endif

// ---- what a thread works in --------------------------------------------------------------------

struct Workspace {
  Buffers buffers;
#if QUANTIZED
  // The blocks whose turn it is to be updated and to be encoded; nothing is pending between chunks.
  Pending pending[2];
  int turn = 0;
#endif
};

// Each thread has one of its own, not on its stack: users may limit stacks to 16 KB. Not inlined,
// so that its address is looked up once for a chunk and not for each block. AddressSanitizer does
// not watch such memory: what it watches works on stacks.
#ifdef __SANITIZE_ADDRESS__
#define OPT_WORKSPACE(name) Workspace name
#else
OPT_NOINLINE Workspace& own_workspace() {
  static thread_local Workspace workspace;
  return workspace;
}
#define OPT_WORKSPACE(name) Workspace& name = own_workspace()
#endif

// ---- the rule --------------------------------------------------------------------------------

// Elements that a block does not have must not count.
OPT_FN Floats without_padding(Floats x, int i, int n) {
  if (i + kWidth <= n) return x;
  return lane_numbers() + i < n ? x : Floats{};
}

// The rule on one vector: new states; new parameters if kMoves, else what is measured.
template <bool kStore, bool kMoves>
OPT_FN Floats apply_rule(const Operands& o, int i, const Numbers& step, Floats* states) {
  const Floats p = load<Floats>(o.p + i), g = load<Floats>(o.g + i);
  const Ints stay = stays(g);
  const Floats own_g = rule_gradient(g, step.factor);
  const Floats made =
      update_rule<kStore, !kMoves>(p, own_g, stay, states, step.ratio, step.scalars);
  const Floats u = cautious(made, own_g);
  if (kMoves) {
    const Floats size = Kind<Floats>::splat(step.size);
    store(o.p + i, rule::where(stay, p, moved(p, u, size, step.scalars)));
  }
  return rule::where(stay, Floats{}, u);
}

// New parameters and states of n elements. Where some share scales, states are left in `next`, and
// those of `ready`, a block of the same length, are encoded meanwhile if kEncodes.
#if QUANTIZED
template <bool kEncodes>
OPT_FN void update_strides(const Step& step, const Operands& given, const float* scales, int n,
                           Pending& next, const Pending& ready, Extremes* extremes) {
  const Numbers numbers = step.numbers;
  const Operands o = given;
  Coding codings[STATES];
  uint8_t* targets[STATES];
  for (int j = 0; j < STATES; ++j) codings[j] = ready.codings[j], targets[j] = ready.codes[j];
  for (int i = 0; i < n; i += kStride) {
    Strides states;
    read_states(step, o, scales, i, states);
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      const int at = i + v * kWidth;
      Floats x[STATES];
#pragma GCC unroll 4
      for (int j = 0; j < STATES; ++j) x[j] = states.x[j][v];
      apply_rule<true, true>(o, at, numbers, x);
#pragma GCC unroll 4
      for (int j = 0; j < STATES; ++j) {
        x[j] = without_padding(x[j], at, n);
        store(next.x[j] + at, x[j]);
        extremes[j].add(x[j], kSigned[j]);
      }
    }
    if (!kEncodes) continue;
    uint8_t* codes[STATES];
#pragma GCC unroll 4
    for (int j = 0; j < STATES; ++j) codes[j] = targets[j] + bytes_of(j, i);
    write_stride<false>(step, ready, codings, i, codes);
  }
}
#else
OPT_FN void update_strides(const Operands& o, int n, const Step& step, const Noise& noise) {
  const Numbers numbers = step.numbers;
  for (int i = 0; i < whole(n); i += kStride) {
    Uints words[kVectors];
    draw(noise, i, words);
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      const int at = i + v * kWidth;
      Floats x[STATES];
      for_each_state(OPT_STATE(j) { x[j] = load_state<j>(o.states[j], at); });
      apply_rule<true, true>(o, at, numbers, x);
      for_each_state(OPT_STATE(j) { store_state<j>(o.states[j], at, x[j], words[v]); });
    }
  }
}
#endif
