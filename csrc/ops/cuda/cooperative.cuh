// Launches whose blocks are all resident at once and may meet: apart from launch.cuh because the header for
// it doubles the time that nvcc takes.
//
//   PANFPN_LAUNCH_COOPERATIVE(kernel, grid, block, shared_bytes, stream, arguments...)
//       As PANFPN_LAUNCH; the kernel may call panfpn::grid_sync(). At most
//       panfpn::cooperative_blocks(kernel, threads, shared_bytes) blocks.
#pragma once

#include "ops/cuda/launch.cuh"

#if defined(PANFPN_CUDA_ON_HOST)

#define PANFPN_LAUNCH_COOPERATIVE(kernel, ...) \
  ::panfpn::cuda_on_host::launch(#kernel, true, kernel, __VA_ARGS__)

namespace panfpn {

inline void grid_sync(const std::source_location& where = std::source_location::current()) {
  cuda_on_host::grid_barrier(where);
}

template <typename... Parameters>
int cooperative_blocks(void (*)(Parameters...), int, size_t) {
  return cuda_on_host::kMultiprocessors * cuda_on_host::kBlocksPerMultiprocessor;
}

}  // namespace panfpn

#else

// Only the grid barrier is used: without libcu++, which the header would bring, a .cu file compiles twice as
// fast into the same PTX (CUDA 13.0).
#define _CG_LIMIT_INCLUDED_DEPENDENCIES
#include <cooperative_groups.h>

#define PANFPN_LAUNCH_COOPERATIVE(kernel, ...) ::panfpn::launch_kernel(#kernel, true, kernel, __VA_ARGS__)

namespace panfpn {

__device__ __forceinline__ void grid_sync() {
  cooperative_groups::this_grid().sync();
}

// How many blocks of `threads` threads the current device holds at once.
template <typename... Parameters>
int cooperative_blocks(void (*kernel)(Parameters...), int threads, size_t shared_bytes) {
  constexpr const char* kAsked = "cooperative_blocks";
  allow_shared_bytes(kAsked, kernel, shared_bytes);
  int device = 0, multiprocessors = 0, blocks = 0;
  check_cuda(cudaGetDevice(&device), kAsked);
  check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), kAsked);
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes), kAsked);
  return multiprocessors * blocks;
}

}  // namespace panfpn

#endif
