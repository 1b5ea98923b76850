// How a thread's kVector elements travel between memory and registers.

constexpr int kVector = QUANTIZED ? 8 : 4;  // elements of a thread
constexpr int kTeam = BLOCK / kVector;      // threads that share a block of elements, and its scale
constexpr int kTeams = THREADS / kTeam;  // blocks of elements that THREADS threads take at a time
static_assert(kTeams >= 1, "a block of elements needs one block of threads");

// kVector elements as they are in memory, in as few registers as that takes. On a 16-byte boundary
// (or their size) they are accessed as a whole.
template <class T>
struct alignas(sizeof(T) * kVector < 16 ? sizeof(T) * kVector : 16) Pack {
  uint32_t words[sizeof(T) * kVector / 4];
};

OPT_FN uint32_t to_bits(float x) { return float_bits(x); }
OPT_FN uint32_t to_bits(float16 x) { return x.bits; }
OPT_FN uint32_t to_bits(bfloat16 x) { return x.bits; }
OPT_FN uint32_t to_bits(int16_t x) { return uint16_t(x); }
OPT_FN uint32_t to_bits(uint8_t x) { return x; }
OPT_FN void from_bits(uint32_t bits, float* x) { *x = bits_float(bits); }
OPT_FN void from_bits(uint32_t bits, float16* x) { x->bits = uint16_t(bits); }
OPT_FN void from_bits(uint32_t bits, bfloat16* x) { x->bits = uint16_t(bits); }
OPT_FN void from_bits(uint32_t bits, int16_t* x) { *x = int16_t(bits); }
OPT_FN void from_bits(uint32_t bits, uint8_t* x) { *x = uint8_t(bits); }

template <class T>
OPT_FN T get(const Pack<T>& pack, int i) {
  constexpr int kPerWord = 4 / sizeof(T);
  T value;
  from_bits(pack.words[i / kPerWord] >> (8 * sizeof(T) * (i % kPerWord)), &value);
  return value;
}

template <class T>
OPT_FN void set(Pack<T>& pack, int i, T value) {
  constexpr int kPerWord = 4 / sizeof(T);
  const int shift = 8 * sizeof(T) * (i % kPerWord);
  const uint32_t others = i % kPerWord == 0 ? 0u : pack.words[i / kPerWord];  // set in order
  pack.words[i / kPerWord] = others | to_bits(value) << shift;
}

// All elements as float32, and rounded back to the nearest, ties to even.
template <class T>
OPT_FN void unpack(const Pack<T>& pack, float* x) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) x[i] = to_float(get(pack, i));
}

template <class T>
OPT_FN void pack_floats(const float* x, Pack<T>& pack) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    T value;
    store(&value, x[i]);
    set(pack, i, value);
  }
}

// GPUs round two floats into one register at once; NaN gets another payload than on CPUs.
#if __CUDA_ARCH__ >= 800 && !defined(OPTFACTORY_EMULATED)
OPT_FN void pack_floats(const float* x, Pack<bfloat16>& pack) {
#pragma unroll
  for (int i = 0; i < kVector; i += 2)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pack.words[i / 2]) : "f"(x[i + 1]), "f"(x[i]));
}
OPT_FN void pack_floats(const float* x, Pack<float16>& pack) {
#pragma unroll
  for (int i = 0; i < kVector; i += 2)
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pack.words[i / 2]) : "f"(x[i + 1]), "f"(x[i]));
}
#endif

// ---- states, whatever their format ------------------------------------------------------------

OPT_FN int64_t bytes_of(int j, int64_t elements) { return bytes_of_format(kFormats[j], elements); }

// A thread's elements of one state as they are in memory, without the words that it does not need.
struct StatePack {
  uint32_t words[kVector];
};

template <class T>
OPT_FN Pack<T> pack_of(const StatePack& state) {
  Pack<T> pack;
#pragma unroll
  for (int i = 0; i < int(sizeof(T)) * kVector / 4; ++i) pack.words[i] = state.words[i];
  return pack;
}

template <class T>
OPT_FN void set_pack(StatePack& state, const Pack<T>& pack) {
#pragma unroll
  for (int i = 0; i < int(sizeof(T)) * kVector / 4; ++i) state.words[i] = pack.words[i];
}

struct Place {      // of a thread's elements
  int64_t first;    // of the block, in the tensor
  int64_t block;    // in the tensor
  int n;            // elements of the block; 0 if the thread has none
  int lane;         // in the team
  bool vectorized;  // all arrays can be accessed in packs
  int64_t element;  // number of the block's first one in the whole tensor, if NUMBERS_ELEMENTS
  uint32_t part;    // of a block, if CUTS_BLOCKS
};

// A thread of a team that accesses packs takes neighbouring elements, else every kTeam-th: both
// ways the team's accesses are contiguous.
OPT_FN int position(const Place& at, int i) {
  if (at.vectorized) return at.lane * kVector + i;
#if ANY_HALF_BYTE
  return at.lane * 2 + i % 2 + i / 2 * (2 * kTeam);  // no two threads write to a byte
#else
  return at.lane + i * kTeam;
#endif
}

OPT_FN bool is_full(const Place& at) { return at.vectorized & ((at.lane + 1) * kVector <= at.n); }

template <class T>
OPT_FN bool is_aligned(const T* address) {
  return reinterpret_cast<unsigned long long>(address) % alignof(Pack<T>) == 0;
}

template <class T>
OPT_FN Pack<T> read_pack(const T* base, const Place& at) {
  return *reinterpret_cast<const Pack<T>*>(base + at.first + at.lane * kVector);
}

template <class T>
OPT_FN void write_pack(T* base, const Place& at, const Pack<T>& pack) {
  *reinterpret_cast<Pack<T>*>(base + at.first + at.lane * kVector) = pack;
}

// Offset in memory of an element of a strided tensor, counted in row-major order.
OPT_NOINLINE int64_t strided_offset(const int64_t* view, int64_t element) {
  const int64_t ndim = view[0];
  int64_t offset = 0;
#pragma unroll 1
  for (int64_t d = ndim; d >= 1; --d) {
    offset += element % view[d] * view[ndim + d];
    element /= view[d];
  }
  return offset;
}

OPT_FN int64_t offset_of(const int64_t* view, int64_t element) {
  return view ? strided_offset(view, element) : element;
}

// The same of states.
OPT_FN bool is_aligned_state(int j, const uint8_t* address) {
  if (kFormats[j] == kFloat32) return is_aligned(reinterpret_cast<const float*>(address));
  if (kFormats[j] == kBfloat16) return is_aligned(reinterpret_cast<const bfloat16*>(address));
  if (bits_of_format(kFormats[j]) == 4)
    return reinterpret_cast<unsigned long long>(address) % (kVector / 2) == 0;
  return is_aligned(address);
}

template <class T>
OPT_FN void read_state_as(const uint8_t* base, const Place& at, StatePack& state) {
  set_pack(state, read_pack(reinterpret_cast<const T*>(base), at));
}
OPT_FN void read_state(int j, const uint8_t* base, const Place& at, StatePack& state) {
  if (kFormats[j] == kFloat32) return read_state_as<float>(base, at, state);
  if (kFormats[j] == kBfloat16) return read_state_as<bfloat16>(base, at, state);
  if (bits_of_format(kFormats[j]) == 4) {
    const int64_t first = bytes_of(j, at.first + at.lane * kVector);
    state.words[0] = *reinterpret_cast<const uint32_t*>(base + first);
    return;
  }
  read_state_as<uint8_t>(base, at, state);
}

template <class T>
OPT_FN void write_state_as(uint8_t* base, const Place& at, const StatePack& state) {
  write_pack(reinterpret_cast<T*>(base), at, pack_of<T>(state));
}
OPT_FN void write_state(int j, uint8_t* base, const Place& at, const StatePack& state) {
  if (kFormats[j] == kFloat32) return write_state_as<float>(base, at, state);
  if (kFormats[j] == kBfloat16) return write_state_as<bfloat16>(base, at, state);
  if (bits_of_format(kFormats[j]) == 4) {
    const int64_t first = bytes_of(j, at.first + at.lane * kVector);
    *reinterpret_cast<uint32_t*>(base + first) = state.words[0];
    return;
  }
  write_state_as<uint8_t>(base, at, state);
}

// One element, the i-th of the thread; in order, if it is read. `element` counts in the tensor.
template <class T>
OPT_FN void read_one_as(const uint8_t* base, int64_t element, int i, bool exists, T none,
                        StatePack& state) {
  Pack<T> pack = pack_of<T>(state);
  set(pack, i, exists ? reinterpret_cast<const T*>(base)[element] : none);
  set_pack(state, pack);
}
OPT_FN void read_one(int j, const uint8_t* base, int64_t element, int i, bool exists,
                     StatePack& state) {
  if (kFormats[j] == kFloat32) return read_one_as(base, element, i, exists, 0.0f, state);
  if (kFormats[j] == kBfloat16) return read_one_as(base, element, i, exists, bfloat16{}, state);
  if (bits_of_format(kFormats[j]) == 4) {
    const uint32_t pair = exists ? base[element / 2] : 0u, place = i ^ 1;
    const uint32_t others = i == 0 ? 0u : state.words[0];  // set in order
    state.words[0] = others | (pair >> (element % 2 == 0 ? 4 : 0) & 15u) << (4 * place);
    return;
  }
  const uint8_t none = kFormats[j] == kMap8 && kSigned[j] ? kZeroCode : 0;
  read_one_as(base, element, i, exists, none, state);
}

template <class T>
OPT_FN void write_one_as(uint8_t* base, int64_t element, int i, const StatePack& state) {
  reinterpret_cast<T*>(base)[element] = get(pack_of<T>(state), i);
}
OPT_FN void write_one(int j, uint8_t* base, int64_t element, int i, const StatePack& state) {
  if (kFormats[j] == kFloat32) return write_one_as<float>(base, element, i, state);
  if (kFormats[j] == kBfloat16) return write_one_as<bfloat16>(base, element, i, state);
  if (bits_of_format(kFormats[j]) == 4) {
    // Pairs are a thread's own: both are written with the first.
    if (i % 2 == 0) base[element / 2] = uint8_t(state.words[0] >> (4 * i));
    return;
  }
  write_one_as<uint8_t>(base, element, i, state);
}
