// Sums and unions over all 32 lanes of a warp. sm_80 and newer have an instruction for each; older GPUs take
// five shuffles.
#pragma once

#include "ops/cuda/launch.cuh"

namespace panfpn::inline PANFPN_ARITHMETIC {

template <typename Combine>
__device__ __forceinline__ unsigned int reduce_by_shuffles(unsigned int value, Combine combine) {
  PANFPN_UNROLL
  for (int other = 1; other < 32; other *= 2) {
    value = combine(value, __shfl_xor_sync(0xFFFFFFFFu, value, other));
  }
  return value;
}

__device__ __forceinline__ unsigned int warp_sum_by_shuffles(unsigned int value) {
  return reduce_by_shuffles(value, [](unsigned int a, unsigned int b) { return a + b; });
}
__device__ __forceinline__ unsigned int warp_or_by_shuffles(unsigned int value) {
  return reduce_by_shuffles(value, [](unsigned int a, unsigned int b) { return a | b; });
}

// All lanes call these together, and all get the result.
__device__ __forceinline__ unsigned int warp_sum(unsigned int value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  return warp_sum_by_shuffles(value);
#else
  return __reduce_add_sync(0xFFFFFFFFu, value);
#endif
}
__device__ __forceinline__ unsigned int warp_or(unsigned int value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  return warp_or_by_shuffles(value);
#else
  return __reduce_or_sync(0xFFFFFFFFu, value);
#endif
}

}  // namespace panfpn::inline PANFPN_ARITHMETIC
