// Barriers, warp functions and atomics of CUDA for the host run.
//
// Stricter than a GPU, so that what is only tolerated there shows up here: the threads of a block must meet
// at the same barrier in the source, a mask may name only lanes that are there, and __activemask() is the
// calling lane alone (no convergence is ever promised). A shuffle that reads a lane outside its mask gets
// 0xFF bytes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <type_traits>

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

// Calls `read` on what all lanes of the mask brought.
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
    case WarpOp::shfl_down:
      source = lane + operand < first + width ? lane + operand : lane;
      break;
    default:
      // A later segment cannot be read, an earlier one can.
      source = (lane ^ operand) < first + width ? lane ^ operand : lane;
  }
  return exchange(op, mask, value, where, [&](const WarpGroup& group) {
    const bool arrived = (group.mask >> (source & 31) & 1u) != 0;
    return from_payload<T>(arrived ? group.payload[static_cast<size_t>(source & 31)] : ~uint64_t{0});
  });
}

template <typename T, typename Combine>
T reduce(unsigned int mask, T value, const Location& where, Combine combine) {
  return exchange(WarpOp::reduce, mask, value, where, [&](const WarpGroup& group) {
    T total{};
    bool empty = true;
    for (size_t lane = 0; lane < 32; ++lane) {
      if ((group.mask >> lane & 1u) == 0) continue;
      const T next = from_payload<T>(group.payload[lane]);
      total = empty ? next : combine(total, next);
      empty = false;
    }
    return total;
  });
}

// Applies `change` to *address and returns the old value. Fibres switch only where we let them, so a plain
// read and write is atomic here.
template <typename T, typename Change>
T atomic(T* address, Change change, const Location& where) {
  if (reinterpret_cast<uintptr_t>(address) % alignof(T) != 0) fail("atomic on a misaligned address", where);
  count_atomic();
  const T old = *address;
  *address = change(old);
  return old;
}

}  // namespace panfpn::cuda_on_host

#define PANFPN_WHERE const std::source_location& where = std::source_location::current()

inline void __syncthreads(PANFPN_WHERE) {
  int live = 0;
  panfpn::cuda_on_host::block_barrier(panfpn::cuda_on_host::BarrierKind::sync, false, where, &live);
}
inline int __syncthreads_count(int predicate, PANFPN_WHERE) {
  int live = 0;
  return panfpn::cuda_on_host::block_barrier(panfpn::cuda_on_host::BarrierKind::sync_count, predicate != 0,
                                             where, &live);
}
inline int __syncthreads_or(int predicate, PANFPN_WHERE) {
  int live = 0;
  return panfpn::cuda_on_host::block_barrier(panfpn::cuda_on_host::BarrierKind::sync_or, predicate != 0,
                                             where, &live) > 0;
}
inline int __syncthreads_and(int predicate, PANFPN_WHERE) {
  int live = 0;
  return panfpn::cuda_on_host::block_barrier(panfpn::cuda_on_host::BarrierKind::sync_and, predicate != 0,
                                             where, &live) == live;
}

inline unsigned int __activemask() {
  return 1u << panfpn::cuda_on_host::lane_of_this_thread();
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
inline int __any_sync(unsigned int mask, int predicate, PANFPN_WHERE) {
  using namespace panfpn::cuda_on_host;
  return exchange(WarpOp::any, mask, predicate, where, [](const WarpGroup& group) {
    return std::any_of(group.payload.begin(), group.payload.end(), [](uint64_t p) { return p != 0; }) ? 1 : 0;
  });
}
inline int __all_sync(unsigned int mask, int predicate, PANFPN_WHERE) {
  using namespace panfpn::cuda_on_host;
  return exchange(WarpOp::all, mask, predicate, where, [](const WarpGroup& group) {
    for (size_t lane = 0; lane < 32; ++lane) {
      if ((group.mask >> lane & 1u) != 0 && group.payload[lane] == 0) return 0;
    }
    return 1;
  });
}

// Overloads, not templates: exactly CUDA's own set, so that a type which nvcc would refuse or convert is
// refused or converted here as well.
#define PANFPN_FOR_EACH_SHUFFLE_TYPE(define)                                            \
  define(int) define(unsigned int) define(long) define(unsigned long) define(long long) \
      define(unsigned long long) define(float) define(double)

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
  inline type __shfl_down_sync(unsigned int mask, type value, unsigned int delta, int width = 32,           \
                               PANFPN_WHERE) {                                                              \
    return panfpn::cuda_on_host::shuffle(panfpn::cuda_on_host::WarpOp::shfl_down, mask, value,              \
                                         static_cast<int>(std::min(delta, 32u)), width, where);             \
  }                                                                                                         \
  inline type __shfl_xor_sync(unsigned int mask, type value, int lane_mask, int width = 32, PANFPN_WHERE) { \
    return panfpn::cuda_on_host::shuffle(panfpn::cuda_on_host::WarpOp::shfl_xor, mask, value,               \
                                         lane_mask & 31, width, where);                                     \
  }                                                                                                         \
  inline unsigned int __match_any_sync(unsigned int mask, type value, PANFPN_WHERE) {                       \
    using namespace panfpn::cuda_on_host;                                                                   \
    return exchange(WarpOp::match_any, mask, value, where, [value](const WarpGroup& group) {                \
      unsigned int same = 0;                                                                                \
      for (size_t lane = 0; lane < 32; ++lane) {                                                            \
        same |= (group.payload[lane] == to_payload(value) ? group.mask & 1u << lane : 0u);                  \
      }                                                                                                     \
      return same;                                                                                          \
    });                                                                                                     \
  }
PANFPN_FOR_EACH_SHUFFLE_TYPE(PANFPN_SHUFFLES)
#undef PANFPN_SHUFFLES
#undef PANFPN_FOR_EACH_SHUFFLE_TYPE

#define PANFPN_REDUCE(type, name, expression)                                                           \
  inline type __reduce_##name##_sync(unsigned int mask, type value, PANFPN_WHERE) {                     \
    return panfpn::cuda_on_host::reduce(mask, value, where, [](type a, type b) { return expression; }); \
  }
PANFPN_REDUCE(unsigned int, add, a + b)
PANFPN_REDUCE(unsigned int, min, std::min(a, b))
PANFPN_REDUCE(unsigned int, max, std::max(a, b))
PANFPN_REDUCE(unsigned int, and, a& b)
PANFPN_REDUCE(unsigned int, or, a | b)
PANFPN_REDUCE(unsigned int, xor, a ^ b)
PANFPN_REDUCE(int, add, static_cast<int>(static_cast<unsigned int>(a) + static_cast<unsigned int>(b)))
PANFPN_REDUCE(int, min, std::min(a, b))
PANFPN_REDUCE(int, max, std::max(a, b))
#undef PANFPN_REDUCE

inline void __threadfence() {
  panfpn::cuda_on_host::count_atomic();
}
inline void __threadfence_block() {
  panfpn::cuda_on_host::count_atomic();
}
inline void __threadfence_system() {
  panfpn::cuda_on_host::count_atomic();
}
inline void __nanosleep(unsigned int) {
  panfpn::cuda_on_host::count_atomic();
}

[[noreturn]] inline void __trap(PANFPN_WHERE) {
  panfpn::cuda_on_host::fail("__trap()", where);
}

#define PANFPN_ATOMIC(type, name, expression)                                               \
  inline type name(type* address, type value, PANFPN_WHERE) {                               \
    return panfpn::cuda_on_host::atomic(                                                    \
        address, [value]([[maybe_unused]] type old) -> type { return expression; }, where); \
  }
PANFPN_ATOMIC(int, atomicAdd,
              static_cast<int>(static_cast<unsigned int>(old) + static_cast<unsigned int>(value)))
PANFPN_ATOMIC(unsigned int, atomicAdd, old + value)
PANFPN_ATOMIC(unsigned long long, atomicAdd, old + value)
PANFPN_ATOMIC(float, atomicAdd, old + value)
PANFPN_ATOMIC(double, atomicAdd, old + value)
PANFPN_ATOMIC(float2, atomicAdd, (float2{old.x + value.x, old.y + value.y}))
PANFPN_ATOMIC(float4, atomicAdd, (float4{old.x + value.x, old.y + value.y, old.z + value.z, old.w + value.w}))
PANFPN_ATOMIC(int, atomicSub,
              static_cast<int>(static_cast<unsigned int>(old) - static_cast<unsigned int>(value)))
PANFPN_ATOMIC(unsigned int, atomicSub, old - value)
PANFPN_ATOMIC(unsigned int, atomicInc, old >= value ? 0u : old + 1u)
PANFPN_ATOMIC(unsigned int, atomicDec, old == 0u || old > value ? value : old - 1u)
PANFPN_ATOMIC(int, atomicExch, value)
PANFPN_ATOMIC(unsigned int, atomicExch, value)
PANFPN_ATOMIC(unsigned long long, atomicExch, value)
PANFPN_ATOMIC(float, atomicExch, value)

#define PANFPN_INTEGER_ATOMICS(type)                             \
  PANFPN_ATOMIC(type, atomicMin, std::min(old, value))           \
  PANFPN_ATOMIC(type, atomicMax, std::max(old, value))           \
  PANFPN_ATOMIC(type, atomicAnd, static_cast<type>(old & value)) \
  PANFPN_ATOMIC(type, atomicOr, static_cast<type>(old | value))  \
  PANFPN_ATOMIC(type, atomicXor, static_cast<type>(old ^ value))
PANFPN_INTEGER_ATOMICS(int)
PANFPN_INTEGER_ATOMICS(unsigned int)
PANFPN_INTEGER_ATOMICS(unsigned long long)
PANFPN_ATOMIC(long long, atomicMin, std::min(old, value))
PANFPN_ATOMIC(long long, atomicMax, std::max(old, value))
#undef PANFPN_INTEGER_ATOMICS
#undef PANFPN_ATOMIC

#define PANFPN_ATOMIC_CAS(type)                                                          \
  inline type atomicCAS(type* address, type compare, type value, PANFPN_WHERE) {         \
    return panfpn::cuda_on_host::atomic(                                                 \
        address, [&](type old) -> type { return old == compare ? value : old; }, where); \
  }
PANFPN_ATOMIC_CAS(int)
PANFPN_ATOMIC_CAS(unsigned int)
PANFPN_ATOMIC_CAS(unsigned long long)
PANFPN_ATOMIC_CAS(unsigned short)
#undef PANFPN_ATOMIC_CAS
#undef PANFPN_WHERE
