// What the intrinsics and the launch macro need of the host run of CUDA kernels; scheduler.cpp says how it
// works.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <source_location>
#include <string>

#include "testing/cuda_types.h"

namespace panfpn::cuda_on_host {

using Location = std::source_location;

// Which runnable thread goes next, and in which order blocks run. A kernel that is right gives the same
// result under each of them; one that lacks a barrier differs between `forward` and `reverse`.
enum class Order { forward = 0, reverse = 1, random = 2 };

// Process-wide; the environment variable PANFPN_HOST_ORDER (forward, reverse, random or random:<seed>) is the
// default.
void set_order(Order order, uint64_t seed = 0);

// Kernel launches (that ran at least one block) since the library was loaded.
uint64_t launch_count();

struct LaunchShape {
  const char* kernel;
  dim3 grid;
  dim3 block;
  size_t shared_bytes;
  bool cooperative;  // all blocks are resident together and may meet in grid_sync()
};

// Runs `thread_main(call)` once per thread of the grid. Throws std::runtime_error with kernel, block and
// thread when the launch is not a valid one or when the kernel misuses a barrier or a warp function.
void run_grid(const LaunchShape& shape, void (*thread_main)(const void* call), const void* call);

enum class BarrierKind : uint8_t { sync, sync_or, sync_and, sync_count };

// Waits for all live threads of the block; how many of them gave a true predicate.
int block_barrier(BarrierKind kind, bool predicate, const Location& where, int* live);
void grid_barrier(const Location& where);

enum class WarpOp : uint8_t { sync, ballot, any, all, shfl, shfl_up, shfl_down, shfl_xor, match_any, reduce };

// What the lanes of one warp function brought: its payload per lane of `mask`.
struct WarpGroup {
  std::array<uint64_t, 32> payload;
  uint32_t mask;
  uint32_t arrived;
  uint32_t readers;
  WarpOp op;
  Location where;
};

// Waits until every lane of `mask` has arrived at the same operation with the same mask.
const WarpGroup* warp_arrive(WarpOp op, uint32_t mask, uint64_t payload, const Location& where);
void warp_leave(const WarpGroup* group);

unsigned int lane_of_this_thread();

// Reports misuse by the running thread: the launch stops and throws.
[[noreturn]] void fail(const std::string& message, const Location& where);

// Lets other threads run first when the budget is spent: so that a thread that spins on an atomic does not
// hang, and so that random order also interleaves between atomics.
extern int64_t atomics_before_yield;
void yield_thread();
inline void count_atomic() {
  if (--atomics_before_yield <= 0) yield_thread();
}

// One declaration of shared memory in the source (per template instantiation). Constant-initialised, so the
// `static` one in each kernel needs no guard.
struct SharedSite {
  const char* name;
  uint64_t block_serial = 0;
  void* address = nullptr;
};
// The site's memory in the running block, filled with 0xFF at first use.
void* place_shared(SharedSite& site, size_t bytes, size_t alignment);
void* dynamic_shared(size_t alignment);

// Serial number of the running block; never 0 while a kernel runs.
extern uint64_t running_block_serial;

template <typename T, size_t N>
using SharedArray = T[N];

template <typename T, size_t N>
SharedArray<T, N>& shared_array(SharedSite& site) {
  static_assert(__is_trivially_constructible(T),
                "shared memory is not initialised: no constructor may be needed");
  if (site.block_serial != running_block_serial) place_shared(site, sizeof(T) * N, alignof(T));
  return *static_cast<SharedArray<T, N>*>(site.address);
}

}  // namespace panfpn::cuda_on_host

// Set before a thread runs; the kernel must not write to them.
extern dim3 gridDim;
extern dim3 blockDim;
extern uint3 blockIdx;
extern uint3 threadIdx;
extern const int warpSize;
