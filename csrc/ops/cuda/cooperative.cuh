// Launches with a barrier over the whole grid, whose blocks are all resident at once. Separate from
// launch.cuh because the header that this needs doubles the compile time of nvcc.
//
//   PANFPN_LAUNCH_COOPERATIVE(kernel, grid, block, shared_bytes, stream, arguments...)
//       Like PANFPN_LAUNCH, but the kernel may call panfpn::grid_sync(). The grid has one dimension and at
//       most panfpn::cooperative_blocks(kernel, threads, shared_bytes) blocks. The kernel must be right for
//       any number of blocks: where other work or a limit of the context (MPS, green contexts) leaves less
//       room, fewer blocks are launched.
#pragma once

#include "ops/cuda/launch.cuh"

#define PANFPN_LAUNCH_COOPERATIVE(kernel, ...) ::panfpn::launch_cooperative(#kernel, kernel, __VA_ARGS__)

#if defined(PANFPN_CUDA_ON_HOST)

namespace panfpn::inline PANFPN_ARITHMETIC {

inline void grid_sync(const std::source_location& where = std::source_location::current()) {
  cuda_on_host::grid_barrier(where);
}

// Returns false if the blocks cannot be resident all at once.
template <typename Kernel, typename... Arguments>
bool try_cooperative(const char* name, Kernel* kernel, dim3 grid, Arguments&&... arguments) {
  if (grid.x > static_cast<unsigned>(cuda_on_host::resident_blocks()) && grid.x > 1) return false;
  cuda_on_host::launch(name, true, kernel, grid, std::forward<Arguments>(arguments)...);
  return true;
}

template <typename... Parameters>
int cooperative_blocks(void (*)(Parameters...), int, size_t) {
  return cuda_on_host::kMultiprocessors * cuda_on_host::kBlocksPerMultiprocessor;
}

}  // namespace panfpn::inline PANFPN_ARITHMETIC

#else

// Only the grid barrier is used. Without libcu++, which the header would include, a .cu file compiles twice
// as fast to the same PTX (CUDA 13.0).
#define _CG_LIMIT_INCLUDED_DEPENDENCIES
#include <cooperative_groups.h>

namespace panfpn::inline PANFPN_ARITHMETIC {

__device__ __forceinline__ void grid_sync() {
  cooperative_groups::this_grid().sync();
}

// Returns false if the blocks cannot be resident all at once.
template <typename Kernel, typename... Arguments>
bool try_cooperative(const char* name, Kernel* kernel, dim3 grid, Arguments&&... arguments) {
  const cudaError_t error = try_launch(name, true, kernel, grid, std::forward<Arguments>(arguments)...);
  if (error == cudaErrorCooperativeLaunchTooLarge && grid.x > 1) return false;
  check_cuda(error, name);
  return true;
}

// The number of blocks of `threads` threads that the current device holds at once.
template <typename... Parameters>
int cooperative_blocks(void (*kernel)(Parameters...), int threads, size_t shared_bytes) {
  constexpr const char* kAsked = "cooperative_blocks";
  allow_shared_bytes(kAsked, kernel, shared_bytes);
  int device = 0, multiprocessors = 0, blocks = 0;
  check_cuda(cudaGetDevice(&device), kAsked);
  check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), kAsked);
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes), kAsked);
  if (blocks == 0) {
    throw std::runtime_error("a block of " + std::to_string(threads) +
                             " threads does not fit on a multiprocessor of this GPU");
  }
  return multiprocessors * blocks;
}

}  // namespace panfpn::inline PANFPN_ARITHMETIC

#endif

namespace panfpn::inline PANFPN_ARITHMETIC {

template <typename Kernel, typename... Arguments>
void launch_cooperative(const char* name, Kernel* kernel, dim3 grid, const Arguments&... arguments) {
  while (!try_cooperative(name, kernel, grid, arguments...)) grid.x = (grid.x + 1) / 2;
}

}  // namespace panfpn::inline PANFPN_ARITHMETIC
