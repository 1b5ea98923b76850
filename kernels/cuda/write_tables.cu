// Kernels that keep the tables of optfactory/backends/cuda/tables.py up to date on the device.
// optfactory.rules.codegen puts prelude.cuh before this text.

// Travels as a kernel argument, of which 4096 bytes may be used: so that a table is written without
// host memory that must outlive the call, also when a CUDA graph is captured.
constexpr int kWords = 496;
struct Words {
  int64_t values[kWords];
};

extern "C" {

// target[i] = words.values[i] for i < count, count <= kWords.
__global__ void __launch_bounds__(THREADS, 2)
    optfactory_write(int64_t* target, const int64_t count, const Words words) {
  const int64_t i = threadIdx.x;
  if (blockIdx.x == 0 && i < count) target[i] = words.values[i];
}

// The number of each tensor's coming step, which is that of the last one if it is to be skipped;
// counts these steps if `counts` is not 0.
__global__ void __launch_bounds__(THREADS, 2)
    optfactory_advance(double* const* steps, double* values, const int64_t count,
                       const float* found_inf, const int64_t counts) {
  const double one = found_inf && *found_inf != 0.0f ? 0.0 : 1.0;
  for (int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x; i < count;
       i += int64_t(gridDim.x) * THREADS) {
    values[i] = *steps[i] + one;
    if (counts) *steps[i] = values[i];
  }
}

}  // extern "C"
