// What a kernel source needs to be compiled by nvcc and, for the host run of csrc/testing/, by the C++
// compiler: the launch, shared memory and loop unrolling. Every .cu file includes this first.
//
//   PANFPN_LAUNCH(kernel, grid, block, shared_bytes, stream, arguments...)
//       Launches, and throws std::runtime_error with the kernel's name when the launch fails. An empty grid
//       launches nothing. A kernel with commas in its template arguments goes in parentheses:
//       PANFPN_LAUNCH((f<float, 4>), ...). Where shared_bytes exceeds 32 KiB the kernel is allowed more than
//       the usual 48 KiB in all.
//   PANFPN_SHARED(type, name, count)
//       __shared__ type name[count]. A type with commas or further dimensions needs an alias: using Row =
//       float[33]. Only the alignment of `type` is promised: for 16-byte accesses declare float4, not float.
//   PANFPN_DYNAMIC_SHARED(type, name)
//       type* name: the launch's shared_bytes, aligned to 16 bytes.
//   PANFPN_UNROLL, PANFPN_UNROLL_BY(n)
//       #pragma unroll, which g++ would refuse.
#pragma once

#if defined(PANFPN_CUDA_ON_HOST)

#include "testing/cuda_on_host.h"

#define PANFPN_UNROLL
#define PANFPN_UNROLL_BY(n)

#define PANFPN_SHARED(type, name, ...)                                    \
  static ::panfpn::cuda_on_host::SharedSite panfpn_site_of_##name{#name}; \
  auto& name = ::panfpn::cuda_on_host::shared_array<type, (__VA_ARGS__)>(panfpn_site_of_##name)
#define PANFPN_DYNAMIC_SHARED(type, name) \
  type* const name = static_cast<type*>(::panfpn::cuda_on_host::dynamic_shared(alignof(type)))

#define PANFPN_LAUNCH(kernel, ...) ::panfpn::cuda_on_host::launch(#kernel, false, kernel, __VA_ARGS__)

#else

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <utility>

#define PANFPN_UNROLL _Pragma("unroll")
#define PANFPN_PRAGMA(text) _Pragma(#text)
#define PANFPN_UNROLL_BY(n) PANFPN_PRAGMA(unroll n)

#define PANFPN_SHARED(type, name, ...) __shared__ type name[__VA_ARGS__]
#define PANFPN_DYNAMIC_SHARED(type, name)                                             \
  extern __shared__ __align__(16) unsigned char panfpn_dynamic_shared[];              \
  static_assert(alignof(type) <= 16, "dynamic shared memory is aligned to 16 bytes"); \
  type* const name = reinterpret_cast<type*>(panfpn_dynamic_shared)

#define PANFPN_LAUNCH(kernel, ...) ::panfpn::launch_kernel(#kernel, false, kernel, __VA_ARGS__)

namespace panfpn {

inline void check_cuda(cudaError_t error, const char* kernel) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("kernel ") + kernel + ": " + cudaGetErrorString(error));
}

template <typename Kernel>
void allow_shared_bytes(const char* name, Kernel* kernel, size_t shared_bytes) {
  constexpr size_t kAlwaysAllowed = 32 * 1024;
  if (shared_bytes <= kAlwaysAllowed) return;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(shared_bytes)),
             name);
}

template <typename... Parameters, typename... Arguments>
void launch_kernel(const char* name, bool cooperative, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                   size_t shared_bytes, cudaStream_t stream, Arguments&&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  allow_shared_bytes(name, kernel, shared_bytes);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = cooperative ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
  // Also clears an error of the launch itself, so that it is not reported once more by whoever asks next.
  const cudaError_t last = cudaGetLastError();
  check_cuda(error != cudaSuccess ? error : last, name);
}

}  // namespace panfpn

#endif
