// Kernels with one planted fault each, which the host run must detect. All of them also compile with nvcc.
#include "fixture.h"

constexpr unsigned int kWholeWarp = 0xFFFFFFFFu;

// block_sum without the barrier inside the loop.
__global__ void sum_without_barrier(const float* values, float* sums) {
  PANFPN_SHARED(float, partial, 64);
  partial[threadIdx.x] = values[blockIdx.x * 64 + threadIdx.x];
  __syncthreads();
  for (unsigned int step = 32; step > 0; step /= 2) {
    if (threadIdx.x < step) partial[threadIdx.x] += partial[threadIdx.x + step];
  }
  __syncthreads();
  if (threadIdx.x == 0) sums[blockIdx.x] = partial[0];
}
FIXTURE planted_missing_barrier(const float* values, float* sums, int blocks) {
  return message_of([&] { PANFPN_LAUNCH(sum_without_barrier, blocks, 64, 0, nullptr, values, sums); });
}

// No barrier between writing a value and reading the value of a neighbour.
__global__ void shift_without_barrier(const float* values, float* shifted) {
  PANFPN_DYNAMIC_SHARED(float, row);
  row[threadIdx.x] = values[threadIdx.x];
  shifted[threadIdx.x] = row[(threadIdx.x + 1) % blockDim.x];
}
FIXTURE planted_unordered_read(const float* values, float* shifted) {
  return message_of(
      [&] { PANFPN_LAUNCH(shift_without_barrier, 1, 64, 64 * sizeof(float), nullptr, values, shifted); });
}

// No barrier between reading a value and overwriting it in the next round.
__global__ void overwrite_without_barrier(const float* values, float* sums) {
  PANFPN_SHARED(float, shared, 1);
  float sum = 0.0f;
  for (unsigned int round = 0; round < 4; ++round) {
    if (threadIdx.x == round) shared[0] = values[round];
    __syncthreads();
    sum += shared[0];
  }
  sums[threadIdx.x] = sum;
}
FIXTURE planted_overwrite(const float* values, float* sums) {
  return message_of([&] { PANFPN_LAUNCH(overwrite_without_barrier, 1, 64, 0, nullptr, values, sums); });
}

// Lanes of one warp exchange values through shared memory without __syncwarp.
__global__ void warp_without_sync(const int* values, int* out) {
  PANFPN_SHARED(int, slot, 32);
  slot[threadIdx.x] = values[threadIdx.x];
  out[threadIdx.x] = slot[threadIdx.x ^ 1u];
}
FIXTURE planted_missing_syncwarp(const int* values, int* out) {
  return message_of([&] { PANFPN_LAUNCH(warp_without_sync, 1, 32, 0, nullptr, values, out); });
}

// A shuffle brings the lanes together but does not order what they write to memory.
__global__ void shuffle_as_barrier(const int* values, int* out) {
  PANFPN_SHARED(int, slot, 32);
  slot[threadIdx.x] = values[threadIdx.x];
  const int other = __shfl_xor_sync(kWholeWarp, static_cast<int>(threadIdx.x), 1);
  out[threadIdx.x] = slot[other];
}
FIXTURE planted_shuffle_as_barrier(const int* values, int* out) {
  return message_of([&] { PANFPN_LAUNCH(shuffle_as_barrier, 1, 32, 0, nullptr, values, out); });
}

// A block reads a value that another block of the same grid writes.
__global__ void reads_other_block(int* values) {
  if (threadIdx.x != 0) return;
  values[blockIdx.x] = blockIdx.x == 0 ? 1 : values[blockIdx.x - 1] + 1;
}
FIXTURE planted_block_order(int* values, int blocks) {
  return message_of([&] { PANFPN_LAUNCH(reads_other_block, blocks, 32, 0, nullptr, values); });
}

__global__ void shared_too_short(float* out) {
  PANFPN_SHARED(float, before, 8);
  PANFPN_SHARED(float, row, 31);
  before[threadIdx.x % 8] = 0.0f;
  row[threadIdx.x] = 1.0f;
  __syncthreads();
  out[threadIdx.x] = row[threadIdx.x] + before[0];
}
FIXTURE planted_shared_overrun(float* out) {
  return message_of([&] { PANFPN_LAUNCH(shared_too_short, 1, 32, 0, nullptr, out); });
}

__global__ void dynamic_too_short(float* out) {
  PANFPN_DYNAMIC_SHARED(float, row);
  row[threadIdx.x] = 1.0f;
  __syncthreads();
  out[threadIdx.x] = row[threadIdx.x];
}
FIXTURE planted_dynamic_overrun(float* out) {
  return message_of([&] { PANFPN_LAUNCH(dynamic_too_short, 1, 32, 31 * sizeof(float), nullptr, out); });
}

// Only reads, so no guard zone changes: only AddressSanitizer can detect the fault.
__global__ void reads_beyond_shared(float* out) {
  PANFPN_SHARED(float, row, 32);
  row[threadIdx.x] = 1.0f;
  __syncthreads();
  out[threadIdx.x] = row[threadIdx.x + 1];
}
FIXTURE planted_shared_overread(float* out) {
  return message_of([&] { PANFPN_LAUNCH(reads_beyond_shared, 1, 32, 0, nullptr, out); });
}

__global__ void off_by_one(float* out, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i <= n) out[i] = 1.0f;
}
FIXTURE planted_global_overrun(float* out, int n) {
  return message_of([&] { PANFPN_LAUNCH(off_by_one, n / 32 + 1, 32, 0, nullptr, out, n); });
}

// 16-byte access to memory that is aligned to 4 bytes only.
__global__ void misaligned_vector(const float* values, float4* out) {
  out[threadIdx.x] = *reinterpret_cast<const float4*>(values + 1 + 4 * threadIdx.x);
}
FIXTURE planted_misaligned(const float* values, float4* out) {
  return message_of([&] { PANFPN_LAUNCH(misaligned_vector, 1, 4, 0, nullptr, values, out); });
}

__global__ void reads_unwritten(float* out) {
  PANFPN_SHARED(float, row, 32);
  if (threadIdx.x < 16) row[threadIdx.x] = 1.0f;
  __syncthreads();
  out[threadIdx.x] = row[threadIdx.x];
}
FIXTURE planted_unwritten(float* out) {
  return message_of([&] { PANFPN_LAUNCH(reads_unwritten, 2, 32, 0, nullptr, out); });
}

__global__ void barriers_at_two_places(int* out) {
  if (threadIdx.x < 16) {
    out[threadIdx.x] = 1;
    __syncthreads();
  } else {
    __syncthreads();
  }
}
FIXTURE planted_two_barriers(int* out) {
  return message_of([&] { PANFPN_LAUNCH(barriers_at_two_places, 1, 64, 0, nullptr, out); });
}

// Warp 0 waits for the whole block, lane 0 of warp 1 for its own warp.
__global__ void waits_crosswise(int* out) {
  if (threadIdx.x == 32) __syncwarp();
  __syncthreads();
  out[threadIdx.x] = 1;
}
FIXTURE planted_deadlock(int* out) {
  return message_of([&] { PANFPN_LAUNCH(waits_crosswise, 1, 64, 0, nullptr, out); });
}

__global__ void vote_after_exit(const float* values, unsigned int* votes, int n) {
  const int i = static_cast<int>(threadIdx.x);
  if (i >= n) return;
  votes[i] = __ballot_sync(kWholeWarp, values[i] > 0.0f);
}
FIXTURE planted_exited_lane(const float* values, unsigned int* votes, int n) {
  return message_of([&] { PANFPN_LAUNCH(vote_after_exit, 1, 32, 0, nullptr, values, votes, n); });
}

__global__ void mask_without_self(int* out) {
  out[threadIdx.x] = __shfl_sync(0x0000FFFFu, static_cast<int>(threadIdx.x), 0);
}
FIXTURE planted_mask_without_self(int* out) {
  return message_of([&] { PANFPN_LAUNCH(mask_without_self, 1, 32, 0, nullptr, out); });
}

__global__ void partial_warp(int* out) {
  out[threadIdx.x] = __shfl_xor_sync(kWholeWarp, static_cast<int>(threadIdx.x), 1);
}
FIXTURE planted_partial_warp(int* out) {
  return message_of([&] { PANFPN_LAUNCH(partial_warp, 1, 48, 0, nullptr, out); });
}

// Lane 15 reads lane 16, which is not in the mask: the value is undefined.
__global__ void shuffle_from_outside(int* out) {
  const int next = static_cast<int>(threadIdx.x) + 1;
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(0x0000FFFFu, 5, next);
}
FIXTURE planted_shuffle_outside(int* out) {
  return message_of([&] { PANFPN_LAUNCH(shuffle_from_outside, 1, 32, 0, nullptr, out); });
}

__global__ void spins_for_ever(int* flag) {
  while (atomicAdd(flag, 0) == 0) {
  }
}
FIXTURE planted_spin(int* flag) {
  return message_of([&] { PANFPN_LAUNCH(spins_for_ever, 1, 2, 0, nullptr, flag); });
}

// One thread writes what others add to.
__global__ void plain_beside_atomic(int* total) {
  if (threadIdx.x == 0) {
    *total = 5;
  } else {
    atomicAdd(total, 1);
  }
}
FIXTURE planted_plain_beside_atomic(int* total) {
  return message_of([&] { PANFPN_LAUNCH(plain_beside_atomic, 1, 32, 0, nullptr, total); });
}

__global__ void too_much_shared(float* out) {
  PANFPN_SHARED(float, row, 1024);
  PANFPN_DYNAMIC_SHARED(float, more);
  row[threadIdx.x] = more[threadIdx.x] = 0.0f;
  out[threadIdx.x] = row[threadIdx.x];
}
FIXTURE planted_shared_limit(float* out, int bytes) {
  return message_of([&] { PANFPN_LAUNCH(too_much_shared, 1, 32, static_cast<size_t>(bytes), nullptr, out); });
}

__global__ void nothing() {}
FIXTURE launch_nothing(int blocks, int threads) {
  return message_of([&] { PANFPN_LAUNCH(nothing, blocks, threads, 0, nullptr); });
}
