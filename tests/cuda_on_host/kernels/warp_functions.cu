// Shuffles, votes and reductions within a warp.
#include "fixture.h"
#include "ops/cuda/warp_reduce.cuh"

constexpr unsigned int kWholeWarp = 0xFFFFFFFFu;

template <typename T>
__device__ __forceinline__ T warp_inclusive_scan(T value) {
  const unsigned int lane = threadIdx.x % 32;
  for (unsigned int step = 1; step < 32; step *= 2) {
    const T below = __shfl_up_sync(kWholeWarp, value, step);
    if (lane >= step) value += below;
  }
  return value;
}

// Inclusive scan over one block: a scan within each warp, then a scan over the totals of the warps.
template <typename T>
__global__ void block_scan(const T* __restrict__ values, T* __restrict__ scanned, int n) {
  PANFPN_SHARED(T, totals, 32);
  const int i = static_cast<int>(threadIdx.x);
  const unsigned int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  T value = warp_inclusive_scan(i < n ? values[i] : T(0));
  if (lane == 31) totals[warp] = value;
  __syncthreads();
  if (warp == 0) {
    const T total = lane < blockDim.x / 32 ? totals[lane] : T(0);
    totals[lane] = warp_inclusive_scan(total);
  }
  __syncthreads();
  if (warp > 0) value += totals[warp - 1];
  if (i < n) scanned[i] = value;
}

FIXTURE block_scan_int(const int* values, int* scanned, int n) {
  return message_of([&] { PANFPN_LAUNCH(block_scan<int>, 1, 1024, 0, nullptr, values, scanned, n); });
}
FIXTURE block_scan_float(const float* values, float* scanned, int n) {
  return message_of([&] { PANFPN_LAUNCH(block_scan<float>, 1, 1024, 0, nullptr, values, scanned, n); });
}
FIXTURE block_scan_u64(const unsigned long long* values, unsigned long long* scanned, int n) {
  return message_of(
      [&] { PANFPN_LAUNCH(block_scan<unsigned long long>, 1, 1024, 0, nullptr, values, scanned, n); });
}

// Calls every warp function once per lane; each call writes one row of 32 results.
__global__ void every_function(const int* __restrict__ values, unsigned int* __restrict__ results) {
  const int lane = static_cast<int>(threadIdx.x);
  const int value = values[lane];
  unsigned int* row = results + lane;
  const auto put = [&](auto result) {
    *row = static_cast<unsigned int>(result);
    row += 32;
  };
  put(__ballot_sync(kWholeWarp, value > 0));
  put(__shfl_sync(kWholeWarp, value, 5));
  put(__shfl_sync(kWholeWarp, value, 3, 8));
  put(__shfl_up_sync(kWholeWarp, value, 2, 16));
  put(__shfl_xor_sync(kWholeWarp, value, 9));
  put(__reduce_add_sync(kWholeWarp, static_cast<unsigned int>(value)));
  put(__reduce_or_sync(kWholeWarp, static_cast<unsigned int>(value)));
  // The two halves of the warp take different branches, and each calls a warp function on its own.
  if (lane < 16) {
    put(__ballot_sync(0x0000FFFFu, value > 0));
  } else {
    put(__shfl_xor_sync(0xFFFF0000u, value, 1));
  }
  __syncwarp();
  put(__shfl_xor_sync(kWholeWarp, static_cast<float>(value) + 0.5f, 31));
}

FIXTURE every_warp_function(const int* values, unsigned int* results) {
  return message_of([&] { PANFPN_LAUNCH(every_function, 1, 32, 0, nullptr, values, results); });
}

// Moves the positive values of each warp to the front in their order; counts[w] is their number in warp w.
__global__ void compact_warps(const float* __restrict__ values, float* __restrict__ kept,
                              int* __restrict__ counts, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  const unsigned int lane = threadIdx.x % 32;
  const float value = i < n ? values[i] : 0.0f;
  const unsigned int votes = __ballot_sync(kWholeWarp, value > 0.0f);
  const int before = __popc(votes & ((1u << lane) - 1u));
  const int first = i / 32 * 32;
  if (value > 0.0f) kept[first + before] = value;
  if (lane == 0 && first < n) counts[first / 32] = __popc(votes);
}

FIXTURE compact_warps_float(const float* values, float* kept, int* counts, int n) {
  return message_of(
      [&] { PANFPN_LAUNCH(compact_warps, (n + 95) / 96, 96, 0, nullptr, values, kept, counts, n); });
}

// The sums and unions of the kernels, and the shuffles that replace the instructions below sm_80.
__global__ void every_reduction(const unsigned int* __restrict__ values, unsigned int* __restrict__ results) {
  const int lane = static_cast<int>(threadIdx.x);
  results[lane] = panfpn::warp_sum(values[lane]);
  results[32 + lane] = panfpn::warp_sum_by_shuffles(values[lane]);
  results[64 + lane] = panfpn::warp_or(values[lane]);
  results[96 + lane] = panfpn::warp_or_by_shuffles(values[lane]);
}
FIXTURE every_warp_reduction(const unsigned int* values, unsigned int* results) {
  return message_of([&] { PANFPN_LAUNCH(every_reduction, 1, 32, 0, nullptr, values, results); });
}
