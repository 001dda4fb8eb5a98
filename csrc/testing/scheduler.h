// Interface of the scheduler of the host run for the CUDA functions and the launch macro. scheduler.cpp
// explains how it works.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <source_location>
#include <string>

#include "testing/cuda_types.h"
#include "testing/race_check.h"

namespace panfpn::cuda_on_host {

using Location = std::source_location;

// Order in which runnable threads and blocks run. A correct kernel gives the same result in each order. A
// kernel that lacks a barrier gives different results in `forward` and `reverse` order.
enum class Order { forward = 0, reverse = 1, random = 2 };

// Sets the order for the whole process. The default is the environment variable PANFPN_HOST_ORDER (forward,
// reverse, random or random:<seed>).
void set_order(Order order, uint64_t seed = 0);

// Number of launches that ran at least one block since the library was loaded.
uint64_t launch_count();

struct LaunchShape {
  const char* kernel;
  dim3 grid;
  dim3 block;
  size_t shared_bytes;
};

// Runs `thread_main(call)` once per thread of the grid. Throws std::runtime_error if the launch is invalid or
// if the kernel misuses a barrier or a warp function; the message names the kernel, block and thread.
void run_grid(const LaunchShape& shape, void (*thread_main)(const void* call), const void* call);

// Waits for all live threads of the block.
void block_barrier(const Location& where);

enum class WarpOp : uint8_t { sync, ballot, shfl, shfl_up, shfl_xor, reduce_add, reduce_or };

// The lanes that call one warp function together, with a payload for each lane of `mask`.
struct WarpGroup {
  std::array<uint64_t, 32> payload;
  uint32_t mask;
  uint32_t arrived;
  uint32_t readers;
  WarpOp op;
  Location where;
  race_check::MeetingPoint barrier;  // of __syncwarp
};

// Waits until every lane of `mask` has called the same operation with the same mask.
const WarpGroup* warp_arrive(WarpOp op, uint32_t mask, uint64_t payload, const Location& where);
void warp_leave(const WarpGroup* group);

unsigned int lane_of_this_thread();

// Reports misuse by the running thread: the launch is aborted and throws.
[[noreturn]] void fail(const std::string& message, const Location& where);

// Number of atomics that the running thread may still execute before other threads run. This keeps a thread
// that spins on an atomic from hanging the launch, and lets the random order interleave threads between
// atomics.
extern int64_t atomics_before_yield;
void yield_thread();
PANFPN_UNCHECKED inline void count_atomic() {
  if (--atomics_before_yield <= 0) yield_thread();
}

// One declaration of shared memory in the source, per template instantiation. It is constant-initialised, so
// that the `static` variable in each kernel needs no guard.
struct SharedSite {
  const char* name;
  uint64_t block_serial = 0;
  void* address = nullptr;
};
// Returns the site's memory in the running block. The first call fills it with 0xFF bytes.
void* place_shared(SharedSite& site, size_t bytes, size_t alignment);
void* dynamic_shared(size_t alignment);

// Serial number of the running block; never 0 while a kernel runs.
extern uint64_t running_block_serial;

template <typename T, size_t N>
using SharedArray = T[N];

template <typename T, size_t N>
SharedArray<T, N>& shared_array(SharedSite& site) {
  static_assert(__is_trivially_constructible(T),
                "shared memory is not initialised, so its type must be trivially constructible");
  if (site.block_serial != running_block_serial) place_shared(site, sizeof(T) * N, alignof(T));
  return *static_cast<SharedArray<T, N>*>(site.address);
}

}  // namespace panfpn::cuda_on_host

// The scheduler sets these before it runs a thread. Kernels must not write to them.
extern dim3 gridDim;
extern dim3 blockDim;
extern uint3 blockIdx;
extern uint3 threadIdx;
