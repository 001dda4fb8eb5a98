// CUDA's integer functions that our kernels call. Any other function of CUDA is a compile error in the host
// run until it is added here.
//
// Two expressions can give different results on the host and on a GPU. The cast of a float that does not fit
// the integer type is undefined in C++, while a GPU saturates it and converts NaN to 0. And nvcc may fuse
// a * b + c.
#pragma once

#include <bit>

inline int __popc(unsigned int x) {
  return std::popcount(x);
}
inline int __popcll(unsigned long long x) {
  return std::popcount(x);
}
inline int __ffs(int x) {
  return __builtin_ffs(x);
}

#define PANFPN_MIN_MAX(type)        \
  inline type min(type a, type b) { \
    return b < a ? b : a;           \
  }                                 \
  inline type max(type a, type b) { \
    return a < b ? b : a;           \
  }
PANFPN_MIN_MAX(int)
PANFPN_MIN_MAX(long)
#undef PANFPN_MIN_MAX
