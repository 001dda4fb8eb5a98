// Marks the maths that the C++ compiler (CPU ops), nvcc (CUDA ops) and the host run of the CUDA kernels
// share.
#pragma once

#if defined(__CUDACC__)
#define PANFPN_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define PANFPN_HOST_DEVICE inline
#endif
