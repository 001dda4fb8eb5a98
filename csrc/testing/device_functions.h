// CUDA's bit, conversion and arithmetic functions with the GPU's results, as far as the host can have them.
//
// Not the same on both sides: a plain cast of a float that does not fit an integer (a GPU saturates and turns
// NaN into 0, the host does not: use __float2int_rz and its kin, which do), and a * b + c, which nvcc may
// fuse.
#pragma once

#include <math.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "testing/cuda_types.h"

using std::isfinite;
using std::isinf;
using std::isnan;
using std::signbit;

inline int __popc(unsigned int x) {
  return std::popcount(x);
}
inline int __popcll(unsigned long long x) {
  return std::popcount(x);
}
inline int __ffs(int x) {
  return __builtin_ffs(x);
}
inline int __ffsll(long long x) {
  return __builtin_ffsll(x);
}
inline int __clz(int x) {
  return std::countl_zero(static_cast<unsigned int>(x));
}
inline int __clzll(long long x) {
  return std::countl_zero(static_cast<unsigned long long>(x));
}
inline unsigned int __brev(unsigned int x) {
  unsigned int reversed = 0;
  for (int bit = 0; bit < 32; ++bit) reversed |= (x >> bit & 1u) << (31 - bit);
  return reversed;
}
inline unsigned long long __brevll(unsigned long long x) {
  return static_cast<unsigned long long>(__brev(static_cast<unsigned int>(x))) << 32 |
         __brev(static_cast<unsigned int>(x >> 32));
}
inline int __mulhi(int a, int b) {
  return static_cast<int>(static_cast<long long>(a) * b >> 32);
}
inline unsigned int __umulhi(unsigned int a, unsigned int b) {
  return static_cast<unsigned int>(static_cast<unsigned long long>(a) * b >> 32);
}
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline unsigned int __funnelshift_l(unsigned int low, unsigned int high, unsigned int shift) {
  const unsigned long long both = static_cast<unsigned long long>(high) << 32 | low;
  return static_cast<unsigned int>(both << (shift & 31u) >> 32);
}
inline unsigned int __funnelshift_r(unsigned int low, unsigned int high, unsigned int shift) {
  const unsigned long long both = static_cast<unsigned long long>(high) << 32 | low;
  return static_cast<unsigned int>(both >> (shift & 31u));
}
inline unsigned int __byte_perm(unsigned int x, unsigned int y, unsigned int selector) {
  const unsigned long long bytes = static_cast<unsigned long long>(y) << 32 | x;
  unsigned int result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned int nibble = selector >> (4 * i) & 0xFu;
    unsigned int byte = static_cast<unsigned int>(bytes >> (8 * (nibble & 7u))) & 0xFFu;
    if ((nibble & 8u) != 0) byte = (byte & 0x80u) != 0 ? 0xFFu : 0u;
    result |= byte << (8 * i);
  }
  return result;
}

inline int __float_as_int(float x) {
  return std::bit_cast<int>(x);
}
inline unsigned int __float_as_uint(float x) {
  return std::bit_cast<unsigned int>(x);
}
inline float __int_as_float(int x) {
  return std::bit_cast<float>(x);
}
inline float __uint_as_float(unsigned int x) {
  return std::bit_cast<float>(x);
}
inline long long __double_as_longlong(double x) {
  return std::bit_cast<long long>(x);
}
inline double __longlong_as_double(long long x) {
  return std::bit_cast<double>(x);
}

// Loads and stores with a cache hint.
#define PANFPN_LOAD(name)    \
  template <typename T>      \
  T name(const T* address) { \
    return *address;         \
  }
PANFPN_LOAD(__ldg)
PANFPN_LOAD(__ldca)
PANFPN_LOAD(__ldcg)
PANFPN_LOAD(__ldcs)
PANFPN_LOAD(__ldcv)
PANFPN_LOAD(__ldlu)
#undef PANFPN_LOAD
#define PANFPN_STORE(name)                               \
  template <typename T>                                  \
  void name(T* address, std::type_identity_t<T> value) { \
    *address = value;                                    \
  }
PANFPN_STORE(__stcg)
PANFPN_STORE(__stcs)
PANFPN_STORE(__stwb)
PANFPN_STORE(__stwt)
#undef PANFPN_STORE

// min and max of floats ignore a NaN beside a number, unlike std::min.
#define PANFPN_MIN_MAX(type)        \
  inline type min(type a, type b) { \
    return b < a ? b : a;           \
  }                                 \
  inline type max(type a, type b) { \
    return a < b ? b : a;           \
  }
PANFPN_MIN_MAX(int)
PANFPN_MIN_MAX(unsigned int)
PANFPN_MIN_MAX(long)
PANFPN_MIN_MAX(unsigned long)
PANFPN_MIN_MAX(long long)
PANFPN_MIN_MAX(unsigned long long)
#undef PANFPN_MIN_MAX
inline float min(float a, float b) {
  return ::fminf(a, b);
}
inline float max(float a, float b) {
  return ::fmaxf(a, b);
}
inline double min(double a, double b) {
  return ::fmin(a, b);
}
inline double max(double a, double b) {
  return ::fmax(a, b);
}
inline double min(float a, double b) {
  return ::fmin(a, b);
}
inline double max(float a, double b) {
  return ::fmax(a, b);
}
inline double min(double a, float b) {
  return ::fmin(a, b);
}
inline double max(double a, float b) {
  return ::fmax(a, b);
}
#define PANFPN_MIN_MAX_MIXED(signed_type, unsigned_type)     \
  inline unsigned_type min(unsigned_type a, signed_type b) { \
    return min(a, static_cast<unsigned_type>(b));            \
  }                                                          \
  inline unsigned_type max(unsigned_type a, signed_type b) { \
    return max(a, static_cast<unsigned_type>(b));            \
  }                                                          \
  inline unsigned_type min(signed_type a, unsigned_type b) { \
    return min(static_cast<unsigned_type>(a), b);            \
  }                                                          \
  inline unsigned_type max(signed_type a, unsigned_type b) { \
    return max(static_cast<unsigned_type>(a), b);            \
  }
PANFPN_MIN_MAX_MIXED(int, unsigned int)
PANFPN_MIN_MAX_MIXED(long, unsigned long)
PANFPN_MIN_MAX_MIXED(long long, unsigned long long)
#undef PANFPN_MIN_MAX_MIXED

namespace panfpn::cuda_on_host {

// Keeps the compiler from fusing the value into what is done with it next.
template <typename T>
T rounded(T value) {
#if defined(__x86_64__)
  asm("" : "+x"(value));
#elif defined(__aarch64__)
  asm("" : "+w"(value));
#else
  volatile T kept = value;
  value = kept;
#endif
  return value;
}

// Conversion of an already rounded value as the PTX instruction cvt does it: it saturates, and NaN becomes 0
// unless one of the two types has 64 bits: then the highest bit alone is set.
template <typename To, typename From>
To saturate(From value) {
  if (value != value) {
    if (sizeof(From) == 8 || sizeof(To) == 8) {
      return static_cast<To>(std::make_unsigned_t<To>{1} << (sizeof(To) * 8 - 1));
    }
    return 0;
  }
  // 2^digits is a power of two, so exact; comparing with the largest integer itself would round up.
  const From bound = std::ldexp(From{1}, std::numeric_limits<To>::digits);
  if (value >= bound) return std::numeric_limits<To>::max();
  if (std::is_signed_v<To> ? value < -bound : value < 0) return std::numeric_limits<To>::min();
  return static_cast<To>(value);
}

}  // namespace panfpn::cuda_on_host

#define PANFPN_CONVERT(from, from_name, to, to_name)              \
  inline to __##from_name##2##to_name##_rn(from x) {              \
    return panfpn::cuda_on_host::saturate<to>(std::nearbyint(x)); \
  }                                                               \
  inline to __##from_name##2##to_name##_rz(from x) {              \
    return panfpn::cuda_on_host::saturate<to>(std::trunc(x));     \
  }                                                               \
  inline to __##from_name##2##to_name##_rd(from x) {              \
    return panfpn::cuda_on_host::saturate<to>(std::floor(x));     \
  }                                                               \
  inline to __##from_name##2##to_name##_ru(from x) {              \
    return panfpn::cuda_on_host::saturate<to>(std::ceil(x));      \
  }
PANFPN_CONVERT(float, float, int, int)
PANFPN_CONVERT(float, float, unsigned int, uint)
PANFPN_CONVERT(float, float, long long, ll)
PANFPN_CONVERT(float, float, unsigned long long, ull)
PANFPN_CONVERT(double, double, int, int)
PANFPN_CONVERT(double, double, unsigned int, uint)
PANFPN_CONVERT(double, double, long long, ll)
PANFPN_CONVERT(double, double, unsigned long long, ull)
#undef PANFPN_CONVERT

inline float __int2float_rn(int x) {
  return static_cast<float>(x);
}
inline float __uint2float_rn(unsigned int x) {
  return static_cast<float>(x);
}
inline float __ll2float_rn(long long x) {
  return static_cast<float>(x);
}
inline float __ull2float_rn(unsigned long long x) {
  return static_cast<float>(x);
}
inline double __int2double_rn(int x) {
  return x;
}
inline double __uint2double_rn(unsigned int x) {
  return x;
}
inline double __ll2double_rn(long long x) {
  return static_cast<double>(x);
}
inline double __ull2double_rn(unsigned long long x) {
  return static_cast<double>(x);
}
inline float __double2float_rn(double x) {
  return static_cast<float>(x);
}

inline float __fadd_rn(float a, float b) {
  return panfpn::cuda_on_host::rounded(a + b);
}
inline float __fsub_rn(float a, float b) {
  return panfpn::cuda_on_host::rounded(a - b);
}
inline float __fmul_rn(float a, float b) {
  return panfpn::cuda_on_host::rounded(a * b);
}
inline float __fdiv_rn(float a, float b) {
  return panfpn::cuda_on_host::rounded(a / b);
}
inline float __fmaf_rn(float a, float b, float c) {
  return ::fmaf(a, b, c);
}
inline float __fsqrt_rn(float a) {
  return ::sqrtf(a);
}
inline float __frcp_rn(float a) {
  return panfpn::cuda_on_host::rounded(1.0f / a);
}
inline float __frsqrt_rn(float a) {
  return static_cast<float>(1.0 / ::sqrt(static_cast<double>(a)));
}
inline double __dadd_rn(double a, double b) {
  return panfpn::cuda_on_host::rounded(a + b);
}
inline double __dsub_rn(double a, double b) {
  return panfpn::cuda_on_host::rounded(a - b);
}
inline double __dmul_rn(double a, double b) {
  return panfpn::cuda_on_host::rounded(a * b);
}
inline double __ddiv_rn(double a, double b) {
  return panfpn::cuda_on_host::rounded(a / b);
}
inline double __fma_rn(double a, double b, double c) {
  return ::fma(a, b, c);
}
inline double __dsqrt_rn(double a) {
  return ::sqrt(a);
}

inline float rsqrtf(float a) {
  return static_cast<float>(1.0 / ::sqrt(static_cast<double>(a)));
}
inline double rsqrt(double a) {
  return 1.0 / ::sqrt(a);
}
inline float __saturatef(float a) {
  return a > 0.0f ? (a < 1.0f ? a : 1.0f) : 0.0f;
}
inline float __fdividef(float a, float b) {
  return a / b;
}
// Macros, because glibc declares functions of these names and does not let anybody define them.
#define __expf(x) ::expf(x)
#define __exp10f(x) ::exp10f(x)
#define __logf(x) ::logf(x)
#define __log2f(x) ::log2f(x)
#define __log10f(x) ::log10f(x)
#define __powf(x, y) ::powf(x, y)
#define __sinf(x) ::sinf(x)
#define __cosf(x) ::cosf(x)
#define __tanf(x) ::tanf(x)
