// Marks mathematics that is compiled by the C++ compiler (CPU ops, the host run of the CUDA kernels) and by
// nvcc (CUDA ops).
#pragma once

#include "arithmetic.h"

#if defined(__CUDACC__)
#define PANFPN_HOST_DEVICE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
// always_inline, as on the device: callers that are compiled for several instruction sets need it
// (ops/cpu/simd.h).
#define PANFPN_HOST_DEVICE inline __attribute__((always_inline))
#else
#define PANFPN_HOST_DEVICE inline
#endif
