// CUDA's qualifiers, vector types and the few runtime calls our launchers make, for a C++ compiler without
// CUDA. Alignments are CUDA's own, so that -fsanitize=alignment finds vector accesses that would fault on a
// GPU.
#pragma once

#include <cstddef>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __managed__
#define __grid_constant__
#define __forceinline__ inline
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)
#define __cluster_dims__(...)
// Empty rather than an attribute: libstdc++ spells __attribute__((__noinline__)) in its own headers.
#define __noinline__
#define __shared__ _Pragma("GCC error \"declare shared memory with PANFPN_SHARED or PANFPN_DYNAMIC_SHARED\"")

#define PANFPN_VECTOR_1(scalar, name)                 \
  struct name##1 {                                    \
    scalar x;                                         \
  };                                                  \
  inline constexpr name##1 make_##name##1(scalar x) { \
    return {x};                                       \
  }
#define PANFPN_VECTOR_2(scalar, name, alignment)                \
  struct alignas(alignment) name##2 {                           \
    scalar x, y;                                                \
  };                                                            \
  inline constexpr name##2 make_##name##2(scalar x, scalar y) { \
    return {x, y};                                              \
  }
#define PANFPN_VECTOR_3(scalar, name)                                     \
  struct name##3 {                                                        \
    scalar x, y, z;                                                       \
  };                                                                      \
  inline constexpr name##3 make_##name##3(scalar x, scalar y, scalar z) { \
    return {x, y, z};                                                     \
  }
#define PANFPN_VECTOR_4(scalar, name, alignment)                                    \
  struct alignas(alignment) name##4 {                                               \
    scalar x, y, z, w;                                                              \
  };                                                                                \
  inline constexpr name##4 make_##name##4(scalar x, scalar y, scalar z, scalar w) { \
    return {x, y, z, w};                                                            \
  }
#define PANFPN_VECTORS(scalar, name, alignment_2, alignment_4) \
  PANFPN_VECTOR_1(scalar, name)                                \
  PANFPN_VECTOR_2(scalar, name, alignment_2)                   \
  PANFPN_VECTOR_3(scalar, name)                                \
  PANFPN_VECTOR_4(scalar, name, alignment_4)

PANFPN_VECTORS(signed char, char, 2, 4)
PANFPN_VECTORS(unsigned char, uchar, 2, 4)
PANFPN_VECTORS(short, short, 4, 8)
PANFPN_VECTORS(unsigned short, ushort, 4, 8)
PANFPN_VECTORS(int, int, 8, 16)
PANFPN_VECTORS(unsigned int, uint, 8, 16)
PANFPN_VECTORS(long long, longlong, 16, 16)
PANFPN_VECTORS(unsigned long long, ulonglong, 16, 16)
PANFPN_VECTORS(float, float, 8, 16)
PANFPN_VECTORS(double, double, 16, 16)

#undef PANFPN_VECTORS
#undef PANFPN_VECTOR_4
#undef PANFPN_VECTOR_3
#undef PANFPN_VECTOR_2
#undef PANFPN_VECTOR_1

struct dim3 {
  unsigned int x, y, z;
  constexpr dim3(unsigned int x_ = 1, unsigned int y_ = 1, unsigned int z_ = 1) : x(x_), y(y_), z(z_) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
  constexpr operator uint3() const { return {x, y, z}; }
};

struct CUstream_st;
using cudaStream_t = CUstream_st*;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorCooperativeLaunchTooLarge = 720
};

enum cudaMemcpyKind {
  cudaMemcpyHostToHost = 0,
  cudaMemcpyHostToDevice = 1,
  cudaMemcpyDeviceToHost = 2,
  cudaMemcpyDeviceToDevice = 3,
  cudaMemcpyDefault = 4
};

enum cudaDeviceAttr {
  cudaDevAttrWarpSize = 10,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrCooperativeLaunch = 95,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9
};

// Every call here is done when it returns and the harness reports its errors by exception, so there is no
// error state.
inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
inline cudaError_t cudaPeekAtLastError() {
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "error of the host run";
}
inline const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaSuccess ? "cudaSuccess" : "cudaErrorOnHost";
}

inline cudaError_t cudaMemset(void* target, int value, size_t bytes) {
  if (bytes > 0) std::memset(target, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* target, int value, size_t bytes, cudaStream_t = nullptr) {
  return cudaMemset(target, value, bytes);
}
inline cudaError_t cudaMemcpy(void* target, const void* source, size_t bytes, cudaMemcpyKind) {
  if (bytes > 0) std::memcpy(target, source, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t bytes, cudaMemcpyKind kind,
                                   cudaStream_t = nullptr) {
  return cudaMemcpy(target, source, bytes, kind);
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) {
  return cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() {
  return cudaSuccess;
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

namespace panfpn::cuda_on_host {
// Few and odd, so that grids sized by the device still loop on small shapes.
inline constexpr int kMultiprocessors = 3;
inline constexpr int kBlocksPerMultiprocessor = 2;
inline constexpr size_t kMaxSharedBytes = 232448;  // 227 KiB: what sm_90 lets a block opt in to
inline constexpr size_t kDefaultSharedBytes =
    48 * 1024;                                    // without opting in; also all that static arrays may take
inline constexpr size_t kOptInBytes = 32 * 1024;  // launch.cuh opts in where the dynamic part is larger
}  // namespace panfpn::cuda_on_host

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int /*device*/) {
  switch (attribute) {
    case cudaDevAttrWarpSize:
      *value = 32;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = panfpn::cuda_on_host::kMultiprocessors;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      return cudaSuccess;
    case cudaDevAttrCooperativeLaunch:
      *value = 1;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(panfpn::cuda_on_host::kMaxSharedBytes);
      return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int, size_t) {
  *blocks = panfpn::cuda_on_host::kBlocksPerMultiprocessor;
  return cudaSuccess;
}
