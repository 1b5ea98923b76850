// The tables that the CUDA kernels walk over, and how a thread finds its elements.

// ---- tables shared with optfactory/backends/cuda/tables.py: every field is 8 bytes ------------

struct Part {  // of a block that is cut
  int64_t first;
  int64_t n;
  int64_t block;    // among the scales
  int64_t element;  // number of the first one in the whole tensor, if NUMBERS_ELEMENTS
};

struct Tensor {
  int64_t rows;  // blocks run inside rows
  int64_t cols;
  int64_t first_chunk;  // its chunks are first_chunk .. first_chunk + chunks - 1
  int64_t chunks;
  int64_t number;     // of the parameter in its optimizer
  Kept* kept;         // beside the parameter, if KEEPS
  float* history;     // squared gradient norms, if CLIPS
  int64_t element;    // number of the first one in the whole tensor, if NUMBERS_ELEMENTS,
  int64_t stride;     // and from row to row there
  int64_t elements;   // of the whole tensor
  const Part* parts;  // of blocks, if CUTS_BLOCKS; so are the next
  float* own_scales;  // [parts][STATES]
  float* new_scales;  // [STATES][scales]
  int64_t scales;     // of each state
};

struct StatePointers {    // a tensor's state, or the part of it that is in device memory now
  uint8_t* state[SLOTS];  // of whatever format
  float* absmax[SLOTS];   // null where elements share no scales
};

struct Chunk {
  uint32_t tensor;
  uint32_t states;  // index of its StatePointers
  uint32_t first_block;
  uint32_t blocks;
};

struct Bucket {
  const Tensor* tensors;
  const StatePointers* states;
  const Chunk* chunks;
  int64_t begin_chunk;  // this launch's part of the chunks
  int64_t end_chunk;
  // Columns with one entry per tensor: what may change from step to step.
  PARAM* const* p;
  const GRAD* const* g;
  const int64_t* const* p_view;  // null if row-major contiguous, else [ndim, sizes..., strides...]
  const int64_t* const* g_view;
  const int64_t* scalar_row;
  const Scalars* scalars;
  double* partial_sums;      // [chunks][kSums]: as those of tensors
  uint32_t* partial_scales;  // [chunks][STATES]: patterns of float32, if TENSOR_WISE
  double* sums;              // [tensors][kSums]: of all chunks; or of g^2 [tensors]
  float* ratios;             // [tensors], if HAS_RATIO
  float* factors;            // [tensors]: of gradients, if CLIPS
  float* scales;             // [tensors][STATES]: of the new states, if TENSOR_WISE
  int64_t tensor_count;
  const float* grad_scale;  // null, or the factor to divide gradients by
  const float* found_inf;   // null, or not 0 if this step must not change anything
  MapPointers maps;
};

// ---- one chunk ----------------------------------------------------------------------------------

// What a thread keeps of its chunk's tensor; what only the slow ways need is read again there.
struct Work {
  PARAM* p;
  const GRAD* g;
  const Scalars* scalars;
  const StatePointers* states;
  Kept* kept;
  const float* new_scales;
  float factor;  // of the gradient
  float ratio;   // of the tensor
  uint32_t key;  // of random bits
  int64_t numel;
  int64_t cols;
  int64_t element;  // as those of Tensor, which say what they are for
  int64_t stride;
  const Part* parts;
  float* own_scales;
  int64_t scales;
  uint32_t tensor;
  bool strided;
  bool ragged;  // there are several rows, and each ends with a short block
};

OPT_FN Work open_chunk(const Bucket& bucket, const Chunk& chunk) {
  const Tensor& tensor = bucket.tensors[chunk.tensor];
  Work work;
  work.p = bucket.p[chunk.tensor];
  work.g = bucket.g[chunk.tensor];
  work.scalars = bucket.scalars + bucket.scalar_row[chunk.tensor];
  work.states = bucket.states + chunk.states;
  work.kept = tensor.kept;
  work.new_scales = CUTS_BLOCKS ? tensor.new_scales : bucket.scales + STATES * chunk.tensor;
  work.factor = CLIPS ? bucket.factors[chunk.tensor] : 1.0f;
  work.ratio = HAS_RATIO ? bucket.ratios[chunk.tensor] : 1.0f;
  work.key = NUMBERS_ELEMENTS ? random_key(tensor.number, *work.scalars) : 0u;
  work.numel = tensor.rows * tensor.cols;
  work.cols = tensor.cols;
  work.element = tensor.element;
  work.stride = tensor.stride;
  work.parts = tensor.parts;
  work.own_scales = tensor.own_scales;
  work.scales = tensor.scales;
  work.tensor = chunk.tensor;
  work.strided = bucket.p_view[chunk.tensor] || bucket.g_view[chunk.tensor];
  work.ragged = tensor.rows > 1;
  return work;
}

OPT_FN Place place_of(const Work& work, uint32_t block, bool exists) {
  Place at;
  at.lane = int(threadIdx.x) % kTeam;
  at.block = block;
#if CUTS_BLOCKS
  const Part part = exists ? work.parts[block] : Part{};
  at.first = part.first;
  at.n = int(part.n);
  at.block = part.block;
  at.element = part.element;
  at.part = block;
#else
  at.first = int64_t(block) * BLOCK;
  at.element = work.element + at.first;
  int64_t left = work.numel - at.first;
  if (work.ragged) {
    const uint32_t per_row = uint32_t((work.cols + BLOCK - 1) / BLOCK);
    const uint32_t row = block / per_row;
    const int64_t col = int64_t(block - row * per_row) * BLOCK;
    at.first = row * work.cols + col;
    at.element = work.element + row * work.stride + col;
    left = work.cols - col;
  }
  at.n = !exists ? 0 : left < BLOCK ? int(left) : BLOCK;
#endif
  at.vectorized = !work.strided & is_aligned(work.p + at.first) & is_aligned(work.g + at.first);
#pragma unroll
  for (int j = 0; j < STATES; ++j)
    at.vectorized &= is_aligned_state(j, work.states->state[j] + bytes_of(j, at.first));
  if (KEEPS) at.vectorized = at.vectorized & is_aligned(work.kept + at.first);
  return at;
}

// Runs body(work, place) for every block of elements of a chunk; teams without a block take part
// with a place of no elements, since all threads meet where scales are reduced.
template <class Body>
OPT_FN void for_each_block(const Bucket& bucket, const Chunk& chunk, Body body) {
  const Work work = open_chunk(bucket, chunk);
  const uint32_t end = chunk.first_block + chunk.blocks;
  for (uint32_t first = chunk.first_block; first < end; first += kTeams) {
    const uint32_t block = first + threadIdx.x / kTeam;
    body(work, place_of(work, block, block < end));
  }
}
