// exp and log of a vector.
#pragma once

#include "ops/cpu/lanes.h"

namespace panfpn::inline PANFPN_ARITHMETIC {

template <typename A>
struct LaneBitsOf;
template <>
struct LaneBitsOf<float> {
  typedef int32_t type __attribute__((vector_size(64)));
};
template <>
struct LaneBitsOf<double> {
  typedef int64_t type __attribute__((vector_size(64)));
};
template <typename A>
using LaneBits = typename LaneBitsOf<A>::type;

// e^x = 2^n e^r with n = round(x / ln 2) and |r| <= ln 2 / 2. ln 2 is split in two; kLn2High has so few bits
// that its products with n are exact. kPolynomial holds 2 e^r, the highest power first, with the smallest
// maximum relative error among polynomials whose first two terms are exact: 3e-9 (4e-18 in double).
template <typename A>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  static constexpr int kFraction = 23, kTerms = 7;
  static constexpr float kLog2E = 0x1.715476p+0f, kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;
  static constexpr float kLowest = -87.4f, kHighest = 88.8f;  // n = -126 and n = 128
  static constexpr float kRound = 0x1.8p+23f + 126;
  static constexpr float kPolynomial[kTerms] = {
      0x1.6a2352p-9f, 0x1.123a6cp-6f, 0x1.5558f4p-4f, 0x1.555490p-2f, 0x1.fffffcp-1f, 2.0f, 2.0f};
};
template <>
struct ExpConstants<double> {
  static constexpr int kFraction = 52, kTerms = 12;
  static constexpr double kLog2E = 0x1.71547652b82fep+0, kLn2High = 0x1.62e42fefa3p-1,
                          kLn2Low = 0x1.3de6af278ece6p-42;
  static constexpr double kLowest = -708.6, kHighest = 709.79;  // n = -1022 and n = 1024
  static constexpr double kRound = 0x1.8p+52 + 1022;
  static constexpr double kPolynomial[kTerms] = {0x1.ad7f02a6aa9a0p-25,
                                                 0x1.28adce726e390p-21,
                                                 0x1.71df262c47695p-18,
                                                 0x1.a01999adcc22fp-15,
                                                 0x1.a01a0129b4608p-12,
                                                 0x1.6c16c1844b015p-9,
                                                 0x1.1111111127e83p-6,
                                                 0x1.55555555507f1p-4,
                                                 0x1.55555555554f9p-2,
                                                 0x1.000000000000ap+0,
                                                 2.0,
                                                 2.0};
};

// e^x within 1.2 units in the last place. Results below twice the smallest normal number are 0, results that
// are too large are infinity, and NaN stays NaN. Without kMayBePositive, x must be at most 80.
template <typename A, bool kMayBePositive = true>
PANFPN_ALWAYS_INLINE void exp_lanes(const Lanes<A>& exponent, Lanes<A>& result) {
  using K = ExpConstants<A>;
  const Lanes<A> zero{}, lowest = zero + K::kLowest, highest = zero + K::kHighest;
  Lanes<A> x = exponent < lowest ? lowest : exponent;
  if constexpr (kMayBePositive) x = x > highest ? highest : x;
  // Adding this large number rounds to an integer. The last bits of the sum are then the bits of 2^(n - 1),
  // or of 0 for the lowest n. Half of the power is multiplied by twice the polynomial, so that the largest
  // power is not infinite.
  const Lanes<A> rounded = x * K::kLog2E + K::kRound;
  const Lanes<A> n = rounded - K::kRound;
  const Lanes<A> r = x - n * K::kLn2High - n * K::kLn2Low;
  LaneBits<A> bits;
  std::memcpy(&bits, &rounded, sizeof(bits));
  bits <<= K::kFraction;
  Lanes<A> power;
  std::memcpy(&power, &bits, sizeof(power));
  Lanes<A> sum = zero + K::kPolynomial[0];
  for (int i = 1; i < K::kTerms; ++i) sum = sum * r + K::kPolynomial[i];
  result = sum * power;
}

// log x = n ln 2 + log m with m from sqrt(1/2) to sqrt(2), and log m = 2 atanh s with s = (m - 1) / (m + 1).
// This is the number of terms of the series of atanh.
template <typename A>
inline constexpr int kLogTerms = 5;
template <>
inline constexpr int kLogTerms<double> = 11;

// log x within 3 units in the last place, for positive normal numbers. NaN stays NaN.
template <typename A>
PANFPN_ALWAYS_INLINE void log_lanes(const Lanes<A>& x, Lanes<A>& result) {
  using K = ExpConstants<A>;
  const Lanes<A> zero{}, half_root = zero + A(0.70710678118654752440);
  LaneBits<A> bits, least;
  std::memcpy(&bits, &x, sizeof(bits));
  std::memcpy(&least, &half_root, sizeof(least));
  const LaneBits<A> exponent = (bits - least) >> K::kFraction;
  bits -= exponent << K::kFraction;
  Lanes<A> m;
  std::memcpy(&m, &bits, sizeof(m));
  const Lanes<A> n = __builtin_convertvector(exponent, Lanes<A>);
  const Lanes<A> s = (m - A(1)) / (m + A(1)), square = s * s;
  Lanes<A> series = zero + A(2) / A(2 * kLogTerms<A> - 1);
  for (int k = kLogTerms<A> - 1; k > 0; --k) series = series * square + A(2) / A(2 * k - 1);
  result = n * K::kLn2High + (n * K::kLn2Low + series * s) + x * A(0);
}

}  // namespace panfpn::inline PANFPN_ARITHMETIC
