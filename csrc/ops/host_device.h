// Marks the maths that the C++ compiler (CPU ops), nvcc (CUDA ops) and the host run of the CUDA kernels
// share.
#pragma once

#if defined(__CUDACC__)
#define PANFPN_HOST_DEVICE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
// Always, as on the device: the callers that are compiled for several instruction sets need it
// (ops/cpu/simd.h).
#define PANFPN_HOST_DEVICE inline __attribute__((always_inline))
#else
#define PANFPN_HOST_DEVICE inline
#endif
