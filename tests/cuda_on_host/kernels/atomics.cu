// Atomics, exits before a barrier, spinning and indices.
#include "fixture.h"

// Counts the values per bin, first in shared memory; each block then adds its counts to the global ones.
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
    PANFPN_LAUNCH(histogram, 3, 96, bytes, nullptr, values, bins, n, num_bins);
  });
}

// Threads from n on exit before the first barrier. out[0] is the sum of the values.
__global__ void early_exit(const int* __restrict__ values, int* __restrict__ out, int n) {
  PANFPN_SHARED(int, sum, 1);
  const int i = static_cast<int>(threadIdx.x);
  if (i >= n) return;
  if (i == 0) sum[0] = 0;
  __syncthreads();
  atomicAdd(&sum[0], values[i]);
  __syncthreads();
  if (i == 0) out[0] = sum[0];
}

FIXTURE early_exit_int(const int* values, int* out, int n) {
  return message_of([&] { PANFPN_LAUNCH(early_exit, 1, 200, 0, nullptr, values, out, n); });
}

// Thread 0 spins until the last thread of its block has set the flag.
__global__ void wait_for_flag(int* flag, int* seen) {
  if (threadIdx.x == 0) {
    while (atomicAdd(flag, 0) == 0) {
    }
    *seen = atomicAdd(flag, 0);
  } else if (threadIdx.x == blockDim.x - 1) {
    atomicAdd(flag, 7);
  }
}

FIXTURE wait_for_flag_int(int* flag, int* seen) {
  return message_of([&] { PANFPN_LAUNCH(wait_for_flag, 1, 64, 0, nullptr, flag, seen); });
}

// All threads of two blocks run each atomic, each on its own address.
__global__ void all_atomics(int* sum, unsigned int* words, unsigned long long* wide, float* real,
                            float4* pack) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  atomicAdd(sum, -i);
  atomicAdd(&words[0], 1u << 30);
  atomicOr(&words[1], 1u << (i % 31));
  atomicAdd(wide, 1ull << 32);
  atomicAdd(real, 0.5f);
  atomicAdd(pack, make_float4(1.0f, 0.0f, -1.0f, 0.25f));
}

FIXTURE all_atomics_of_kernels(int* sum, unsigned int* words, unsigned long long* wide, float* real,
                               float4* pack) {
  return message_of([&] { PANFPN_LAUNCH(all_atomics, 2, 62, 0, nullptr, sum, words, wide, real, pack); });
}

// Each thread adds its block and thread number to the element at its own index.
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
