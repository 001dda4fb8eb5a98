// Sum per block through shared memory: a kernel template with two parameters, static and dynamic shared
// memory.
#include "fixture.h"

template <typename T, int kThreads>
__global__ void __launch_bounds__(kThreads)
    block_sum(const T* __restrict__ values, T* __restrict__ sums, int n) {
  PANFPN_SHARED(T, partial, kThreads);
  const int i = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  partial[threadIdx.x] = i < n ? values[i] : T(0);
  __syncthreads();
  PANFPN_UNROLL
  for (unsigned int step = kThreads / 2; step > 0; step /= 2) {
    if (threadIdx.x < step) partial[threadIdx.x] += partial[threadIdx.x + step];
    __syncthreads();
  }
  if (threadIdx.x == 0) sums[blockIdx.x] = partial[0];
}

FIXTURE block_sum_float(const float* values, float* sums, int n) {
  return message_of(
      [&] { PANFPN_LAUNCH((block_sum<float, 128>), (n + 127) / 128, 128, 0, nullptr, values, sums, n); });
}
FIXTURE block_sum_double(const double* values, double* sums, int n) {
  return message_of(
      [&] { PANFPN_LAUNCH((block_sum<double, 64>), (n + 63) / 64, 64, 0, nullptr, values, sums, n); });
}

// Transposes [rows, columns] in tiles of 16 x 16, with two-dimensional blocks and an alias for the row type.
__global__ void transpose(const float* __restrict__ input, float* __restrict__ output, int rows,
                          int columns) {
  using Row = float[17];
  PANFPN_SHARED(Row, tile, 16);
  const int tx = static_cast<int>(threadIdx.x), ty = static_cast<int>(threadIdx.y);
  const int x = static_cast<int>(blockIdx.x) * 16, y = static_cast<int>(blockIdx.y) * 16;
  if (y + ty < rows && x + tx < columns) tile[ty][tx] = input[(y + ty) * columns + x + tx];
  __syncthreads();
  if (x + ty < columns && y + tx < rows) output[(x + ty) * rows + y + tx] = tile[tx][ty];
}

FIXTURE transpose_float(const float* input, float* output, int rows, int columns) {
  return message_of([&] {
    const dim3 grid((static_cast<unsigned int>(columns) + 15) / 16,
                    (static_cast<unsigned int>(rows) + 15) / 16);
    PANFPN_LAUNCH(transpose, grid, dim3(16, 16), 0, nullptr, input, output, rows, columns);
  });
}

// Reverses each run of blockDim.x values.
__global__ void reverse_runs(const int* __restrict__ values, int* __restrict__ reversed) {
  PANFPN_DYNAMIC_SHARED(int, run);
  const unsigned int first = blockIdx.x * blockDim.x;
  run[threadIdx.x] = values[first + threadIdx.x];
  __syncthreads();
  reversed[first + threadIdx.x] = run[blockDim.x - 1 - threadIdx.x];
}

FIXTURE reverse_runs_int(const int* values, int* reversed, int runs, int length) {
  return message_of([&] {
    const size_t bytes = static_cast<size_t>(length) * sizeof(int);
    PANFPN_LAUNCH(reverse_runs, runs, length, bytes, nullptr, values, reversed);
  });
}
