// Atomics, exits before a barrier, votes of a whole block, spinning, and grids that meet.
#include "fixture.h"

// Counts per bin: in shared memory first, then added to the grid's.
__global__ void histogram(const int* __restrict__ values, unsigned int* __restrict__ bins, int n,
                          int num_bins) {
  PANFPN_DYNAMIC_SHARED(unsigned int, local);
  const int stride = static_cast<int>(blockDim.x);
  for (int b = static_cast<int>(threadIdx.x); b < num_bins; b += stride) local[b] = 0;
  __syncthreads();
  for (int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); i < n;
       i += static_cast<int>(gridDim.x * blockDim.x)) {
    atomicAdd(&local[values[i]], 1u);
  }
  __syncthreads();
  for (int b = static_cast<int>(threadIdx.x); b < num_bins; b += stride) atomicAdd(&bins[b], local[b]);
}

FIXTURE histogram_int(const int* values, unsigned int* bins, int n, int num_bins) {
  return message_of([&] {
    const size_t bytes = static_cast<size_t>(num_bins) * sizeof(unsigned int);
    cudaMemsetAsync(bins, 0, bytes, nullptr);
    PANFPN_LAUNCH(histogram, 3, 96, bytes, nullptr, values, bins, n, num_bins);
  });
}

// Threads beyond n exit; the rest still meet at barriers. out[0] = how many are left, out[1] = any value
// negative, out[2] = all values above -100, out[3] = the sum.
__global__ void early_exit(const int* __restrict__ values, int* __restrict__ out, int n) {
  PANFPN_SHARED(int, sum, 1);
  const int i = static_cast<int>(threadIdx.x);
  if (i >= n) return;
  if (i == 0) sum[0] = 0;
  const int left = __syncthreads_count(1);
  atomicAdd(&sum[0], values[i]);
  const int any = __syncthreads_or(values[i] < 0);
  const int all = __syncthreads_and(values[i] > -100);
  if (i == 0) {
    out[0] = left;
    out[1] = any;
    out[2] = all;
    out[3] = sum[0];
  }
}

FIXTURE early_exit_int(const int* values, int* out, int n) {
  return message_of([&] { PANFPN_LAUNCH(early_exit, 1, 200, 0, nullptr, values, out, n); });
}

// A lock by compare-and-swap: threads spin until they own it. `counter` is not changed atomically.
__global__ void locked_count(int* lock, int* counter) {
  bool done = false;
  while (!done) {
    if (atomicCAS(lock, 0, 1) == 0) {
      *counter += 1;
      __threadfence();
      atomicExch(lock, 0);
      done = true;
    }
  }
}

FIXTURE locked_count_int(int* lock, int* counter) {
  return message_of([&] { PANFPN_LAUNCH(locked_count, 2, 64, 0, nullptr, lock, counter); });
}

// Thread 0 waits for what the last thread of its block writes.
__global__ void wait_for_flag(volatile int* flag, int* seen) {
  if (threadIdx.x == 0) {
    while (*flag == 0) __threadfence();
    *seen = *flag;
  } else if (threadIdx.x == blockDim.x - 1) {
    *flag = 7;
  }
}

FIXTURE wait_for_flag_int(int* flag, int* seen) {
  return message_of([&] { PANFPN_LAUNCH(wait_for_flag, 1, 64, 0, nullptr, flag, seen); });
}

// results: add, sub, max, min, and, or, xor, exch, cas of one slot each, by all threads of two blocks.
__global__ void all_atomics(int* slots, float* real, unsigned long long* wide) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  atomicAdd(&slots[0], i);
  atomicSub(&slots[1], i);
  atomicMax(&slots[2], i);
  atomicMin(&slots[3], -i);
  atomicAnd(&slots[4], ~(1 << (i % 31)));
  atomicOr(&slots[5], 1 << (i % 31));
  atomicXor(&slots[6], 1 << (i % 31));
  atomicExch(&slots[7], 42);
  atomicCAS(&slots[8], 0, i + 1);
  atomicAdd(real, 0.5f);
  atomicMax(wide, 1ull << (i % 64));
  atomicAdd(wide + 1, 1ull << 32);
}

FIXTURE all_atomics_int(int* slots, float* real, unsigned long long* wide) {
  return message_of([&] { PANFPN_LAUNCH(all_atomics, 2, 62, 0, nullptr, slots, real, wide); });
}

// Every block adds its share, all meet, every block reads the total.
__global__ void grid_total(const int* __restrict__ values, int n, int* total, int* seen) {
  for (int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); i < n;
       i += static_cast<int>(gridDim.x * blockDim.x)) {
    atomicAdd(total, values[i]);
  }
  panfpn::grid_sync();
  if (threadIdx.x == 0) seen[blockIdx.x] = *total;
}

FIXTURE grid_total_int(const int* values, int n, int* total, int* seen, int max_blocks, int* blocks) {
  return message_of([&] {
    const int resident = panfpn::cooperative_blocks(grid_total, 64, 0);
    *blocks = resident < max_blocks ? resident : max_blocks;
    PANFPN_LAUNCH_COOPERATIVE(grid_total, *blocks, 64, 0, nullptr, values, n, total, seen);
  });
}

// One thread per index of a grid: which (block, thread) came there.
__global__ void indices(int* out) {
  const unsigned int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const unsigned int threads = blockDim.x * blockDim.y * blockDim.z;
  atomicAdd(&out[block * threads + thread], static_cast<int>(block * 1000 + thread));
}

FIXTURE all_indices(int* out, int gx, int gy, int gz, int bx, int by, int bz) {
  return message_of([&] {
    const auto u = [](int v) { return static_cast<unsigned int>(v); };
    PANFPN_LAUNCH(indices, dim3(u(gx), u(gy), u(gz)), dim3(u(bx), u(by), u(bz)), 0, nullptr, out);
  });
}

__global__ void convert(const float* __restrict__ x, int* __restrict__ i32, long long* __restrict__ i64,
                        unsigned int* __restrict__ u32) {
  const unsigned int i = threadIdx.x;
  i32[i] = __float2int_rn(x[i]);
  i64[i] = __float2ll_rd(x[i]);
  u32[i] = __float2uint_rz(x[i]);
}

FIXTURE convert_floats(const float* x, int n, int* i32, long long* i64, unsigned int* u32) {
  return message_of([&] { PANFPN_LAUNCH(convert, 1, n, 0, nullptr, x, i32, i64, u32); });
}
