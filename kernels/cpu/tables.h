// The tables that optfactory/backends/cpu/tables.py fills for the kernels of update.cpp, and how a
// block of elements is read from a tensor.

static_assert(BLOCK % kStride == 0, "a block is a number of strides");

// ---- tables shared with optfactory/backends/cpu/tables.py: every field is 8 bytes ------------

struct Part {  // of a block that is cut
  int64_t first;
  int64_t n;
  int64_t block;    // among the scales
  int64_t element;  // number of the first one in the whole tensor, if NUMBERS_ELEMENTS
};

struct Tensor {
  PARAM* p;
  const GRAD* g;
  const int64_t* p_view;  // null if row-major contiguous, else [ndim, sizes..., strides...]
  const int64_t* g_view;
  int64_t rows;  // blocks run inside rows
  int64_t cols;
  int64_t scalars;      // its row in Bucket::scalars
  int64_t first_chunk;  // its chunks are first_chunk .. first_chunk + chunks - 1
  int64_t chunks;
  int64_t number;          // of the parameter in its optimizer
  Kept* kept;              // beside the parameter, if KEEPS
  float* history;          // squared gradient norms, if CLIPS
  int64_t element;         // number of the first one in the whole tensor, if NUMBERS_ELEMENTS,
  int64_t stride;          // and from row to row there
  int64_t elements;        // of the whole tensor
  const Part* parts;       // of blocks, if CUTS_BLOCKS; so are the next
  float* own_scales;       // [parts][STATES]
  float* new_scales;       // [STATES][scales]
  int64_t scales;          // of each state
  uint8_t* state[STATES];  // of whatever format
  float* absmax[STATES];   // null where elements share no scales
};

struct Chunk {
  int64_t tensor;
  int64_t first_block;
  int64_t end_block;
};

struct Bucket {
  const Tensor* tensors;
  const Chunk* chunks;
  const Scalars* scalars;
  double* partial_sums;   // [chunks][kSums]: as those of tensors
  float* partial_scales;  // [chunks][STATES], if TENSOR_WISE
  double* sums;           // [tensors][kSums]: of all chunks; or of g^2 [tensors]
  float* ratios;          // [tensors], if HAS_RATIO
  float* factors;         // [tensors]: of gradients, if CLIPS
  float* scales;          // [tensors][STATES]: of the new states, if TENSOR_WISE
  int64_t tensor_count;
  int64_t chunk_count;
  int64_t threads;
  QuantizationMap maps[STATES];
};

// ---- reading one block of at most BLOCK elements ---------------------------------------------

constexpr int kMaxDims = 64;  // as in torch

// Calls visit(i, offset in memory) for n elements of a strided tensor, in row-major order.
template <class Visit>
OPT_FN void for_each_strided(const int64_t* view, int64_t first, int n, Visit visit) {
  const int64_t ndim = view[0];
  const int64_t* sizes = view + 1;
  const int64_t* strides = sizes + ndim;
  int64_t index[kMaxDims], offset = 0, rest = first;
  for (int64_t d = ndim - 1; d >= 0; --d) {
    index[d] = rest % sizes[d];
    offset += index[d] * strides[d];
    rest /= sizes[d];
  }
  for (int i = 0; i < n; ++i) {
    visit(i, offset);
    for (int64_t d = ndim - 1; d >= 0; --d) {
      offset += strides[d];
      if (++index[d] < sizes[d]) break;
      offset -= sizes[d] * strides[d];
      index[d] = 0;
    }
  }
}

// Copies n elements into a buffer of float32.
template <class T>
OPT_FN void read_elements(const T* base, const int64_t* view, int64_t first, int n, float* buffer) {
  if (view) {
    for_each_strided(view, first, n,
                     [&](int i, int64_t offset) { buffer[i] = to_float(base[offset]); });
    return;
  }
  const int done = read_together(base + first, n, buffer);
#pragma omp simd
  for (int i = done; i < n; ++i) buffer[i] = to_float(base[first + i]);
}
