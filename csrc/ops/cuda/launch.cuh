// Macros that let a kernel source compile with nvcc and, for the host run of csrc/testing/, with the C++
// compiler: launches, shared memory and loop unrolling. Every .cu file includes this file.
//
//   PANFPN_LAUNCH(kernel, grid, block, shared_bytes, stream, arguments...)
//       Launches the kernel; throws std::runtime_error with its name if the launch fails. An empty grid
//       launches nothing. A kernel with commas in its template arguments needs parentheses:
//       PANFPN_LAUNCH((f<float, 4>), ...). If shared_bytes exceeds 32 KiB, the kernel is allowed all shared
//       memory that the device gives a block, instead of the default limit of 48 KiB in total.
//   most_shared_bytes()
//       The most shared memory, static and dynamic, that a block can have on the current device.
//   PANFPN_SHARED(type, name, count)
//       __shared__ type name[count]. A type with commas or more dimensions needs an alias:
//       using Row = float[33]. Only the alignment of `type` is guaranteed: for 16-byte accesses declare
//       float4, not float.
//   PANFPN_DYNAMIC_SHARED(type, name)
//       type* name: the launch's shared_bytes, aligned to 16 bytes.
//   PANFPN_UNROLL, PANFPN_UNROLL_BY(n)
//       #pragma unroll, which g++ would reject.
#pragma once

#include "arithmetic.h"

#if defined(PANFPN_CUDA_ON_HOST)

#include "testing/cuda_on_host.h"

#define PANFPN_UNROLL
#define PANFPN_UNROLL_BY(n)

#define PANFPN_SHARED(type, name, ...)                                    \
  static ::panfpn::cuda_on_host::SharedSite panfpn_site_of_##name{#name}; \
  auto& name = ::panfpn::cuda_on_host::shared_array<type, (__VA_ARGS__)>(panfpn_site_of_##name)
#define PANFPN_DYNAMIC_SHARED(type, name) \
  type* const name = static_cast<type*>(::panfpn::cuda_on_host::dynamic_shared(alignof(type)))

#define PANFPN_LAUNCH(kernel, ...) ::panfpn::cuda_on_host::launch(#kernel, kernel, __VA_ARGS__)

namespace panfpn::inline PANFPN_ARITHMETIC {

inline size_t most_shared_bytes() {
  return cuda_on_host::most_shared_bytes();
}

}  // namespace panfpn::inline PANFPN_ARITHMETIC

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

#define PANFPN_LAUNCH(kernel, ...) ::panfpn::launch_kernel(#kernel, kernel, __VA_ARGS__)

namespace panfpn::inline PANFPN_ARITHMETIC {

// The remedy for an error that comes from the build or the driver, else an empty text.
inline std::string remedy_for(cudaError_t error) {
  if (error != cudaErrorNoKernelImageForDevice && error != cudaErrorUnsupportedPtxVersion) return "";
  std::string text = ". Built for";
#if defined(__CUDA_ARCH_LIST__)
  for (const int architecture : {__CUDA_ARCH_LIST__}) text += " sm_" + std::to_string(architecture / 10);
#endif
  int device = 0, major = 0, minor = 0;
  std::string own = "<that of this GPU>";
  if (cudaGetDevice(&device) == cudaSuccess &&
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess) {
    text += ", and this GPU is sm_" + std::to_string(10 * major + minor);
    own = std::to_string(major) + "." + std::to_string(minor);
  }
  cudaGetLastError();
  return text + "; reinstall panfpn_fast with TORCH_CUDA_ARCH_LIST=" + own;
}

inline void check_cuda(cudaError_t error, const char* kernel) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("kernel ") + kernel + ": " + cudaGetErrorString(error) +
                           remedy_for(error));
}

inline size_t most_shared_bytes() {
  constexpr const char* kAsked = "most_shared_bytes";
  int device = 0, bytes = 0;
  check_cuda(cudaGetDevice(&device), kAsked);
  check_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), kAsked);
  return static_cast<size_t>(bytes);
}

// Raises the kernel's limit to the device's, and never to the size of one launch: another host thread may
// launch the same kernel with more shared memory in between.
template <typename Kernel>
void allow_shared_bytes(const char* name, Kernel* kernel, size_t shared_bytes) {
  constexpr size_t kAlwaysAllowed = 32 * 1024;
  if (shared_bytes <= kAlwaysAllowed) return;
  cudaFuncAttributes attributes{};
  check_cuda(cudaFuncGetAttributes(&attributes, kernel), name);
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(most_shared_bytes() - attributes.sharedSizeBytes)),
             name);
}

template <typename... Parameters, typename... Arguments>
void launch_kernel(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                   size_t shared_bytes, cudaStream_t stream, Arguments&&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  allow_shared_bytes(name, kernel, shared_bytes);
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
  // Cleared, so that the next check of an unrelated call does not report the error again.
  const cudaError_t last = cudaGetLastError();
  check_cuda(error != cudaSuccess ? error : last, name);
}

}  // namespace panfpn::inline PANFPN_ARITHMETIC

#endif
