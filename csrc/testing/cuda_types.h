// CUDA's qualifiers and the types that our kernels use, for a C++ compiler without CUDA. Vector types have
// CUDA's alignment, so that -fsanitize=alignment finds vector accesses that would fault on a GPU.
#pragma once

#include <cstddef>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
// Empty because libstdc++ spells __attribute__((__noinline__)) in its own headers.
#define __noinline__
#define __shared__ _Pragma("GCC error \"declare shared memory with PANFPN_SHARED or PANFPN_DYNAMIC_SHARED\"")

struct uint3 {
  unsigned int x, y, z;
};
struct alignas(16) uint4 {
  unsigned int x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline constexpr float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}

struct dim3 {
  unsigned int x, y, z;
  constexpr dim3(unsigned int x_ = 1, unsigned int y_ = 1, unsigned int z_ = 1) : x(x_), y(y_), z(z_) {}
  constexpr operator uint3() const { return {x, y, z}; }
};

struct CUstream_st;
using cudaStream_t = CUstream_st*;

namespace panfpn::cuda_on_host {
// The limit without opting in, and the limit for static arrays in any case.
inline constexpr size_t kDefaultSharedBytes = 48 * 1024;
// launch.cuh opts in if the dynamic part is larger than this.
inline constexpr size_t kOptInBytes = 32 * 1024;
}  // namespace panfpn::cuda_on_host
