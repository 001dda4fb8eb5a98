// Vectors of accumulators, the size of one register, and their loads and stores for each dtype of feature
// maps.
//
// A vector has 64 bytes on every processor: in the narrower clones of a PANFPN_VECTOR_CLONES function, the
// compiler splits it. Vectors are passed by reference, because their calling convention differs between the
// clones.
#pragma once

#include <cstdint>
#include <cstring>

#include "ops/cpu/simd.h"
#include "stable_compat.h"

namespace panfpn::inline PANFPN_ARITHMETIC {

template <typename A>
struct LanesOf;
template <>
struct LanesOf<float> {
  typedef float type __attribute__((vector_size(64)));
};
template <>
struct LanesOf<double> {
  typedef double type __attribute__((vector_size(64)));
};
template <typename A>
using Lanes = typename LanesOf<A>::type;
template <typename A>
inline constexpr int kLanes = 64 / sizeof(A);

// The memory of one vector, aligned.
template <typename A>
struct alignas(64) Block {
  A lanes[kLanes<A>];
};

// The number of channels, rounded up to whole vectors. Arrays of constants for each channel are padded to it,
// so that every load is a full one.
template <typename A>
constexpr int64_t padded_channels(int64_t channels) {
  return (channels + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
}

// The bits of as many numbers, in two or in four bytes each, as a vector V of float32 has.
template <size_t kBytes>
struct BitsOf {
  typedef uint16_t half __attribute__((vector_size(kBytes / 2)));
  typedef uint32_t word __attribute__((vector_size(kBytes)));
};
template <typename V>
using HalfBits = typename BitsOf<sizeof(V)>::half;
template <typename V>
using WordBits = typename BitsOf<sizeof(V)>::word;

// load_lanes and store_lanes also take vectors of other sizes than Lanes.
template <typename V>
PANFPN_ALWAYS_INLINE void load_lanes(const float* from, V& to) {
  static_assert(sizeof(to[0]) == sizeof(float));
  std::memcpy(&to, from, sizeof(to));
}
template <typename V>
PANFPN_ALWAYS_INLINE void load_lanes(const double* from, V& to) {
  static_assert(sizeof(to[0]) == sizeof(double));
  std::memcpy(&to, from, sizeof(to));
}
template <typename V>
PANFPN_ALWAYS_INLINE void load_lanes(const c10::BFloat16* from, V& to) {
  HalfBits<V> bits;
  std::memcpy(&bits, from, sizeof(bits));
  const WordBits<V> wide = __builtin_convertvector(bits, WordBits<V>) << 16;
  std::memcpy(&to, &wide, sizeof(to));
}
// Exponents are rebased from 15 to 127; the exponent of infinities and NaN becomes 255. Subnormals are read
// with an implicit one at 2^-14, which is then subtracted.
template <typename V>
PANFPN_ALWAYS_INLINE void load_lanes(const c10::Half* from, V& to) {
  using Words = WordBits<V>;
  HalfBits<V> bits;
  std::memcpy(&bits, from, sizeof(bits));
  const Words wide = __builtin_convertvector(bits, Words);
  const Words sign = (wide & 0x8000u) << 16, exponent = wide & 0x7C00u, shifted = (wide & 0x7FFFu) << 13;
  const Words special = static_cast<Words>(exponent == 0x7C00u) & 0x38000000u;
  const Words normal = shifted + 0x38000000u + special;
  const Words with_one = shifted + 0x38800000u;
  V subnormal;
  std::memcpy(&subnormal, &with_one, sizeof(subnormal));
  subnormal -= 0x1p-14f;
  Words subnormal_bits;
  std::memcpy(&subnormal_bits, &subnormal, sizeof(subnormal_bits));
  const Words is_subnormal = static_cast<Words>(exponent == 0u);
  const Words result = sign | (subnormal_bits & is_subnormal) | (normal & ~is_subnormal);
  std::memcpy(&to, &result, sizeof(to));
}

template <typename V>
PANFPN_ALWAYS_INLINE void store_lanes(const V& from, float* to) {
  static_assert(sizeof(from[0]) == sizeof(float));
  std::memcpy(to, &from, sizeof(from));
}
template <typename V>
PANFPN_ALWAYS_INLINE void store_lanes(const V& from, double* to) {
  static_assert(sizeof(from[0]) == sizeof(double));
  std::memcpy(to, &from, sizeof(from));
}
// Rounds to nearest, ties to even.
template <typename V>
PANFPN_ALWAYS_INLINE void store_lanes(const V& from, c10::BFloat16* to) {
  using Words = WordBits<V>;
  Words bits;
  std::memcpy(&bits, &from, sizeof(bits));
  const Words rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
  const Words is_nan = static_cast<Words>((bits & 0x7FFFFFFFu) > 0x7F800000u);
  const HalfBits<V> result = __builtin_convertvector((rounded & ~is_nan) | (is_nan & 0x7FC0u), HalfBits<V>);
  std::memcpy(to, &result, sizeof(result));
}
// Rounds to nearest, ties to even. The spacing of float16's subnormals, 2^-24, is the spacing of float32 from
// 0.5 to 1, so adding 0.5 rounds them.
template <typename V>
PANFPN_ALWAYS_INLINE void store_lanes(const V& from, c10::Half* to) {
  using Words = WordBits<V>;
  Words bits;
  std::memcpy(&bits, &from, sizeof(bits));
  const Words sign = bits >> 16 & 0x8000u, size = bits & 0x7FFFFFFFu;
  const Words normal = (size - 0x38000000u + 0xFFFu + (size >> 13 & 1u)) >> 13;
  V shifted;
  std::memcpy(&shifted, &size, sizeof(shifted));
  shifted += 0.5f;
  Words subnormal;
  std::memcpy(&subnormal, &shifted, sizeof(subnormal));
  subnormal -= 0x3F000000u;
  const Words is_small = static_cast<Words>(size < 0x38800000u);
  const Words is_large = static_cast<Words>(size >= 0x47800000u);
  const Words is_nan = static_cast<Words>(size > 0x7F800000u);
  const Words finite = (subnormal & is_small) | (normal & ~is_small);
  const Words result = sign | (finite & ~is_large) | (is_large & 0x7C00u) | (is_nan & 0x0200u);
  const HalfBits<V> narrow = __builtin_convertvector(result, HalfBits<V>);
  std::memcpy(to, &narrow, sizeof(narrow));
}

// Loads the first `count` lanes and sets the others to zero.
template <typename T, typename A>
PANFPN_ALWAYS_INLINE void load_some(const T* from, int64_t count, Lanes<A>& to) {
  T padded[kLanes<A>];
  std::memset(static_cast<void*>(padded), 0, sizeof(padded));
  std::memcpy(static_cast<void*>(padded), from, static_cast<size_t>(count) * sizeof(T));
  load_lanes(padded, to);
}
template <typename T, typename A>
PANFPN_ALWAYS_INLINE void store_some(const Lanes<A>& from, int64_t count, T* to) {
  T padded[kLanes<A>];
  store_lanes(from, padded);
  std::memcpy(static_cast<void*>(to), padded, static_cast<size_t>(count) * sizeof(T));
}

}  // namespace panfpn::inline PANFPN_ARITHMETIC
