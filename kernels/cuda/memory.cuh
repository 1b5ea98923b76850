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
  return at.vectorized ? at.lane * kVector + i : at.lane + i * kTeam;
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
