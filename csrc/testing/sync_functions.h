// The barriers, warp functions and atomics of CUDA that our kernels call, for the host run. Any other
// function of CUDA is a compile error in the host run until it is added here.
//
// The rules are stricter than a GPU's, so that mistakes which a GPU tolerates are found: all threads of a
// block must reach the same barrier in the source, and a mask may name only lanes that exist and have not
// exited. A shuffle that reads a lane outside its mask returns 0xFF bytes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <string>

#include "testing/race_check.h"
#include "testing/scheduler.h"

namespace panfpn::cuda_on_host {

template <typename T>
uint64_t to_payload(T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t payload = 0;
  std::memcpy(&payload, &value, sizeof(T));
  return payload;
}

template <typename T>
T from_payload(uint64_t payload) {
  T value;
  std::memcpy(&value, &payload, sizeof(T));
  return value;
}

// Calls `read` with the values of all lanes in the mask.
template <typename T, typename Read>
auto exchange(WarpOp op, unsigned int mask, T value, const Location& where, Read read) {
  const WarpGroup* group = warp_arrive(op, mask, to_payload(value), where);
  const auto result = read(*group);
  warp_leave(group);
  return result;
}

template <typename T>
T shuffle(WarpOp op, unsigned int mask, T value, int operand, int width, const Location& where) {
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) {
    fail("shuffle: width must be a power of two from 1 to 32, got " + std::to_string(width), where);
  }
  const int lane = static_cast<int>(lane_of_this_thread());
  const int first = lane & ~(width - 1);  // of the segment
  int source = lane;
  switch (op) {
    case WarpOp::shfl:
      source = first + (operand & (width - 1));
      break;
    case WarpOp::shfl_up:
      source = lane - operand >= first ? lane - operand : lane;
      break;
    default:
      // shfl_xor can read an earlier segment but not a later one.
      source = (lane ^ operand) < first + width ? lane ^ operand : lane;
  }
  return exchange(op, mask, value, where, [&](const WarpGroup& group) {
    const bool arrived = (group.mask >> (source & 31) & 1u) != 0;
    return from_payload<T>(arrived ? group.payload[static_cast<size_t>(source & 31)] : ~uint64_t{0});
  });
}

// Combines the values of all lanes in the mask; 0 must be the neutral element of `combine`.
template <typename Combine>
unsigned int reduce(WarpOp op, unsigned int mask, unsigned int value, const Location& where,
                    Combine combine) {
  return exchange(op, mask, value, where, [&](const WarpGroup& group) {
    unsigned int total = 0;
    for (const uint64_t payload : group.payload) total = combine(total, from_payload<unsigned int>(payload));
    return total;
  });
}

// Applies `change` to *address and returns the old value. A plain read and write is atomic here because
// fibres switch only at the scheduler's own calls.
template <typename T, typename Change>
PANFPN_UNCHECKED T read_and_write(T* address, Change change) {
  const T old = *address;
  *address = change(old);
  return old;
}

template <typename T, typename Change>
T atomic(T* address, Change change, const Location& where) {
  if (reinterpret_cast<uintptr_t>(address) % alignof(T) != 0) fail("atomic on a misaligned address", where);
  count_atomic();
  race_check::mark_atomic(address);
  return read_and_write(address, change);
}

}  // namespace panfpn::cuda_on_host

#define PANFPN_WHERE const std::source_location& where = std::source_location::current()

inline void __syncthreads(PANFPN_WHERE) {
  panfpn::cuda_on_host::block_barrier(where);
}

inline void __syncwarp(unsigned int mask = 0xFFFFFFFFu, PANFPN_WHERE) {
  panfpn::cuda_on_host::warp_leave(
      panfpn::cuda_on_host::warp_arrive(panfpn::cuda_on_host::WarpOp::sync, mask, 0, where));
}

inline unsigned int __ballot_sync(unsigned int mask, int predicate, PANFPN_WHERE) {
  using namespace panfpn::cuda_on_host;
  return exchange(WarpOp::ballot, mask, predicate, where, [](const WarpGroup& group) {
    unsigned int votes = 0;
    for (size_t lane = 0; lane < 32; ++lane) votes |= (group.payload[lane] != 0 ? 1u : 0u) << lane;
    return votes;
  });
}

// Overloads rather than a template, so that arguments are converted as nvcc converts them and a type that is
// not listed is a compile error.
#define PANFPN_SHUFFLES(type)                                                                               \
  inline type __shfl_sync(unsigned int mask, type value, int source, int width = 32, PANFPN_WHERE) {        \
    return panfpn::cuda_on_host::shuffle(panfpn::cuda_on_host::WarpOp::shfl, mask, value, source, width,    \
                                         where);                                                            \
  }                                                                                                         \
  inline type __shfl_up_sync(unsigned int mask, type value, unsigned int delta, int width = 32,             \
                             PANFPN_WHERE) {                                                                \
    return panfpn::cuda_on_host::shuffle(panfpn::cuda_on_host::WarpOp::shfl_up, mask, value,                \
                                         static_cast<int>(std::min(delta, 32u)), width, where);             \
  }                                                                                                         \
  inline type __shfl_xor_sync(unsigned int mask, type value, int lane_mask, int width = 32, PANFPN_WHERE) { \
    return panfpn::cuda_on_host::shuffle(panfpn::cuda_on_host::WarpOp::shfl_xor, mask, value,               \
                                         lane_mask & 31, width, where);                                     \
  }
PANFPN_SHUFFLES(int)
PANFPN_SHUFFLES(unsigned int)
PANFPN_SHUFFLES(unsigned long long)
PANFPN_SHUFFLES(float)
#undef PANFPN_SHUFFLES

inline unsigned int __reduce_add_sync(unsigned int mask, unsigned int value, PANFPN_WHERE) {
  using namespace panfpn::cuda_on_host;
  return reduce(WarpOp::reduce_add, mask, value, where, [](auto a, auto b) { return a + b; });
}
inline unsigned int __reduce_or_sync(unsigned int mask, unsigned int value, PANFPN_WHERE) {
  using namespace panfpn::cuda_on_host;
  return reduce(WarpOp::reduce_or, mask, value, where, [](auto a, auto b) { return a | b; });
}

#define PANFPN_ATOMIC(type, name, expression)                                                              \
  inline type name(type* address, type value, PANFPN_WHERE) {                                              \
    return panfpn::cuda_on_host::atomic(address, [value](type old) -> type { return expression; }, where); \
  }
PANFPN_ATOMIC(int, atomicAdd,
              static_cast<int>(static_cast<unsigned int>(old) + static_cast<unsigned int>(value)))
PANFPN_ATOMIC(unsigned int, atomicAdd, old + value)
PANFPN_ATOMIC(unsigned long long, atomicAdd, old + value)
PANFPN_ATOMIC(float, atomicAdd, old + value)
PANFPN_ATOMIC(float4, atomicAdd, (float4{old.x + value.x, old.y + value.y, old.z + value.z, old.w + value.w}))
PANFPN_ATOMIC(unsigned int, atomicOr, old | value)
#undef PANFPN_ATOMIC
#undef PANFPN_WHERE
