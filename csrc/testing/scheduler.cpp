// Runs a grid on one host thread. Every CUDA thread is a fibre. It runs until it waits at a barrier or warp
// function, exits, or has used its budget of atomics. The scheduler then resumes the first runnable thread in
// the chosen order. Each thread runs as far as it can before the next one starts, so if a barrier is missing,
// the order decides which values are read.
#include "testing/scheduler.h"

#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <string_view>
#include <vector>

#include "testing/fibre.h"
#include "testing/gpu_limits.h"
#include "testing/race_check.h"
#include "testing/scheduler_state.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#include <cstdio>
#endif

dim3 gridDim;
dim3 blockDim;
uint3 blockIdx;
uint3 threadIdx;

namespace panfpn::cuda_on_host {

int64_t atomics_before_yield = 0;
uint64_t running_block_serial = 0;

namespace {

constexpr int64_t kAtomicsPerTurn = 1 << 16;
// After this many atomics without an exit or a completed barrier, all threads are taken to be spinning.
constexpr int64_t kAtomicsWithoutProgress = int64_t{1} << 24;

// Never destroyed, because a host thread may still launch a kernel while the process exits.
Scheduler& scheduler() {
  static Scheduler* const instance = new Scheduler;
  return *instance;
}

std::mutex& launch_mutex() {
  static std::mutex* const instance = new std::mutex;
  return *instance;
}

}  // namespace

void fibre_main() {
  enter_fibre();
  for (;;) {
    scheduler().run_body();
    const race_check::Pause pause;
    scheduler().exit_thread();
  }
}

#if defined(__SANITIZE_ADDRESS__)
static void print_running_thread() {
  if (scheduler().inside())
    std::fprintf(stderr, "panfpn: while running %s\n", scheduler().describe_running().c_str());
}
#endif

void Scheduler::set_order(Order order, uint64_t seed) {
  order_ = order;
  seed_ = seed;
  order_known_ = true;
}

void Scheduler::read_environment() {
  const char* value = std::getenv("PANFPN_HOST_ORDER");
  const std::string_view order = value == nullptr ? "" : value;
  if (order.empty() || order == "forward") {
    set_order(Order::forward, 0);
  } else if (order == "reverse") {
    set_order(Order::reverse, 0);
  } else if (order == "random") {
    set_order(Order::random, 0);
  } else if (order.starts_with("random:") && order.size() > 7 &&
             order.find_first_not_of("0123456789", 7) == std::string_view::npos) {
    set_order(Order::random, std::strtoull(value + 7, nullptr, 10));
  } else {
    throw std::runtime_error("PANFPN_HOST_ORDER: expected forward, reverse, random or random:<seed>, got " +
                             std::string(order));
  }
}

// splitmix64 (Steele, Lea, Flood 2014), which is good for any seed.
uint64_t Scheduler::random() {
  uint64_t z = (random_state_ += 0x9E3779B97F4A7C15ull);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

void Scheduler::check(const LaunchShape& shape) const {
  const auto refuse = [&](const std::string& why) {
    throw std::runtime_error(std::string("kernel ") + shape.kernel + ": invalid launch: " + why);
  };
  const dim3 grid = shape.grid, block = shape.block;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0) refuse("the block has no threads");
  if (block.x > 1024 || block.y > 1024 || block.z > 64 || threads > 1024) {
    refuse("a block has at most 1024 threads and at most (1024, 1024, 64) along the axes, got " +
           text(block));
  }
  if (grid.x > 0x7FFFFFFFu || grid.y > 65535 || grid.z > 65535) {
    refuse("a grid has at most (2147483647, 65535, 65535) blocks, got " + text(grid));
  }
  if (shape.shared_bytes > most_shared_bytes()) {
    refuse("a block has at most " + std::to_string(most_shared_bytes()) +
           " bytes of dynamic shared memory, got " + std::to_string(shape.shared_bytes));
  }
}

void Scheduler::run(const LaunchShape& shape, void (*thread_main)(const void*), const void* call) {
  check(shape);
  if (!order_known_) read_environment();
  const uint64_t blocks = uint64_t{shape.grid.x} * shape.grid.y * shape.grid.z;
  if (blocks == 0) return;
  ++launches_;
  shape_ = shape;
  thread_main_ = thread_main;
  call_ = call;
  threads_per_block_ = size_t{shape.block.x} * shape.block.y * shape.block.z;
  random_state_ = seed_;
  host_.checked = race_check::running_fibre();
  race_check::before_all(&begins_);
  gridDim = shape.grid;
  blockDim = shape.block;
  prepare();
  // Random order: i -> (i * step + offset) % blocks visits each block once if step and blocks are coprime.
  uint64_t step = 1, offset = 0;
  if (order_ == Order::random) {
    offset = random() % blocks;
    do {
      step = 1 + random() % blocks;
    } while (std::gcd(step, blocks) != 1);
  }
  for (uint64_t i = 0; i < blocks; ++i) {
    uint64_t ordinal = i;
    if (order_ == Order::reverse) ordinal = blocks - 1 - i;
    if (order_ == Order::random) {
      ordinal = static_cast<uint64_t>((static_cast<unsigned __int128>(i) * step + offset) % blocks);
    }
    start_block(ordinal);
    run_block();
  }
  race_check::after_all(&ends_);
}

void Scheduler::prepare() {
  threads_.resize(threads_per_block_);
  block_.warps.resize((threads_per_block_ + 31) / 32);
  const dim3 dim = shape_.block;
  for (uint32_t i = 0; i < threads_per_block_; ++i) {
    const uint3 index{i % dim.x, i / dim.x % dim.y, i / (dim.x * dim.y)};
    threads_[i] = Thread{index, i, nullptr, false, Wait::none, {}, nullptr};
  }
}

void Scheduler::start_block(uint64_t ordinal) {
  const uint64_t x = shape_.grid.x, y = shape_.grid.y;
  block_.index = uint3{static_cast<uint32_t>(ordinal % x), static_cast<uint32_t>(ordinal / x % y),
                       static_cast<uint32_t>(ordinal / (x * y))};
  block_.serial = ++block_serial_;
  block_.live = static_cast<int>(threads_per_block_);
  block_.arrived = 0;
  for (size_t w = 0; w < block_.warps.size(); ++w) {
    const size_t lanes = std::min<size_t>(32, threads_per_block_ - w * 32);
    block_.warps[w].lanes = lanes == 32 ? ~0u : (1u << lanes) - 1;
    block_.warps[w].exited = 0;
    block_.warps[w].pending.clear();
  }
  block_.arena.reset(shape_.shared_bytes);
  for (Thread& thread : threads_) thread.finished = false, thread.wait = Wait::none;
}

void Scheduler::run_block() {
  live_ = threads_.size();
  yielded_.clear();
  ready_.fill(threads_.size());
  failed_ = false;
  progress();
  while (live_ > 0) {
    Thread* thread = next_thread();
    if (thread == nullptr) {
      const std::string report = deadlock_report(shape_.kernel, block_.index, threads_);
      abandon_all();
      throw std::runtime_error(report);
    }
    running_ = thread;
    if (thread->fibre == nullptr) {
      thread->fibre = fibres_.take();
      if constexpr (race_check::kEnabled) {
        race_check::name_fibre(thread->fibre->context.checked, describe_running().c_str());
      }
    }
    threadIdx = thread->index;
    blockIdx = block_.index;
    running_block_serial = block_.serial;
    set_budget();
    switch_context(host_, thread->fibre->context);
    running_ = nullptr;
    if (failed_) {
      abandon_all();
      throw std::runtime_error(failure_);
    }
    if (thread->finished) {
      fibres_.give_back(thread->fibre);
      thread->fibre = nullptr;
    }
  }
  running_block_serial = 0;
  if (const auto array = block_.arena.damaged()) {
    throw std::runtime_error(std::string("kernel ") + shape_.kernel + ", block " + text(block_.index) +
                             ": a write outside the bounds of " + *array);
  }
}

Thread* Scheduler::next_thread() {
  size_t found = order_ == Order::random ? ready_.first_from(random() % ready_.size()) : ready_.first();
  if (found == ready_.size()) {
    if (yielded_.empty()) return nullptr;
    for (const size_t thread : yielded_) set_ready(thread);
    yielded_.clear();
    found = ready_.first();
  }
  return &threads_[position(found)];
}

void Scheduler::set_budget() {
  atomics_granted_ = order_ == Order::random ? 1 + static_cast<int64_t>(random() % 8) : kAtomicsPerTurn;
  atomics_before_yield = atomics_granted_;
}

void Scheduler::yield() {
  atomics_without_progress_ += atomics_granted_;
  if (atomics_without_progress_ > kAtomicsWithoutProgress) {
    fail("all threads spin on atomics and none makes progress", nullptr);
  }
  // In random order the thread stays runnable. In the other orders all other threads run first; otherwise a
  // spinning thread would be chosen forever.
  if (order_ != Order::random) {
    ready_.erase(position(index_of(*running_)));
    yielded_.push_back(index_of(*running_));
  }
  suspend();
}

void Scheduler::set_ready(size_t thread) {
  threads_[thread].wait = Wait::none;
  ready_.insert(position(thread));
}

void Scheduler::wait(Wait kind, const Location& where, const WarpGroup* group) {
  running_->wait = kind;
  running_->where = where;
  running_->group = group;
  ready_.erase(position(index_of(*running_)));
}

void Scheduler::run_body() {
  race_check::after_all(&begins_);
  std::string thrown;
  try {
    thread_main_(call_);
    return;
  } catch (const std::exception& error) {
    thrown = error.what();
  } catch (...) {
    thrown = "an unknown exception";
  }
  fail("the kernel threw " + thrown, nullptr);
}

void Scheduler::exit_thread() {
  Thread& thread = *running_;
  Warp& warp = block_.warps[thread.linear / 32];
  const uint32_t bit = 1u << (thread.linear % 32);
  for (const WarpGroup* group : warp.pending) {
    if (group->mask & bit) {
      fail(std::string("the thread exits while lanes ") + hex(group->arrived) + " wait for it in " +
               name_of(group->op) + " with mask " + hex(group->mask),
           &group->where);
    }
  }
  warp.exited |= bit;
  thread.finished = true;
  ready_.erase(position(index_of(thread)));
  --live_;
  --block_.live;
  progress();
  if (block_.arrived > 0 && block_.arrived == block_.live) release_block();
  race_check::before_all(&ends_);
  suspend();
}

void Scheduler::block_barrier(const Location& where) {
  if (block_.arrived == 0) {
    block_.where = where;
  } else if (block_.where.line() != where.line() ||
             std::string_view(block_.where.file_name()) != where.file_name()) {
    fail("divergent barrier: the thread arrives at __syncthreads here while " +
             std::to_string(block_.arrived) + " other threads of the block wait at __syncthreads in " +
             text(block_.where),
         &where);
  }
  void* const token = block_.barrier.arrive(block_.arrived == 0);
  ++block_.arrived;
  wait(Wait::block, where, nullptr);
  if (block_.arrived == block_.live) release_block();
  suspend();
  race_check::after_all(token);
}

void Scheduler::release_block() {
  block_.arrived = 0;
  for (size_t i = 0; i < threads_per_block_; ++i) {
    if (threads_[i].wait == Wait::block) set_ready(i);
  }
  progress();
}

const WarpGroup* Scheduler::warp_arrive(WarpOp op, uint32_t mask, uint64_t payload, const Location& where) {
  Thread& thread = *running_;
  const size_t warp_index = thread.linear / 32;
  Warp& warp = block_.warps[warp_index];
  const uint32_t lane = thread.linear % 32, bit = 1u << lane;
  if ((mask & bit) == 0) {
    fail(std::string(name_of(op)) + ": mask " + hex(mask) + " does not include the calling lane " +
             std::to_string(lane),
         &where);
  }
  if ((mask & warp.exited) != 0) {
    fail(std::string(name_of(op)) + ": mask " + hex(mask) +
             " includes lanes that have exited: " + hex(mask & warp.exited),
         &where);
  }
  if ((mask & ~warp.lanes) != 0) {
    fail(std::string(name_of(op)) + ": mask " + hex(mask) +
             " includes lanes that the block does not have: " + hex(mask & ~warp.lanes),
         &where);
  }
  size_t g = 0;
  while (g < warp.pending.size() && (warp.pending[g]->op != op || warp.pending[g]->mask != mask)) ++g;
  if (g == warp.pending.size()) {
    if (free_groups_.empty()) {
      groups_.push_back(std::make_unique<WarpGroup>());
      free_groups_.push_back(groups_.back().get());
    }
    WarpGroup* fresh = free_groups_.back();
    free_groups_.pop_back();
    fresh->payload.fill(0);
    fresh->mask = mask;
    fresh->arrived = 0;
    fresh->readers = static_cast<uint32_t>(__builtin_popcount(mask));
    fresh->op = op;
    fresh->where = where;
    warp.pending.push_back(fresh);
  }
  WarpGroup* group = warp.pending[g];
  void* const token = op == WarpOp::sync ? group->barrier.arrive(group->arrived == 0) : nullptr;
  group->payload[lane] = payload;
  group->arrived |= bit;
  wait(Wait::warp, where, group);
  if (group->arrived == mask) release_group(warp, warp_index, g);
  suspend();
  if (op == WarpOp::sync) race_check::after_all(token);
  return group;
}

void Scheduler::release_group(Warp& warp, size_t warp_index, size_t group_index) {
  const WarpGroup* group = warp.pending[group_index];
  warp.pending[group_index] = warp.pending.back();
  warp.pending.pop_back();
  for (uint32_t rest = group->mask; rest != 0; rest &= rest - 1) {
    set_ready(warp_index * 32 + static_cast<size_t>(__builtin_ctz(rest)));
  }
  progress();
}

void Scheduler::warp_leave(const WarpGroup* group) {
  auto* writable = const_cast<WarpGroup*>(group);
  if (--writable->readers == 0) free_groups_.push_back(writable);
}

void* Scheduler::place_shared(SharedSite& site, size_t bytes, size_t alignment) {
  SharedArena& arena = block_.arena;
  site.address = arena.place(site, bytes, alignment);
  site.block_serial = running_block_serial;
  if (arena.static_bytes() > kDefaultSharedBytes) {
    fail("static shared memory including array " + std::string(site.name) + " takes " +
             std::to_string(arena.static_bytes()) + " bytes; at most " + std::to_string(kDefaultSharedBytes) +
             " are allowed",
         nullptr);
  }
  // launch.cuh opts in to more than 48 KiB depending on the size of the dynamic part alone.
  const size_t limit = shape_.shared_bytes > kOptInBytes ? most_shared_bytes() : kDefaultSharedBytes;
  if (arena.static_bytes() + shape_.shared_bytes > limit) {
    fail("static and dynamic shared memory take " +
             std::to_string(arena.static_bytes() + shape_.shared_bytes) + " bytes together; at most " +
             std::to_string(limit) + " are allowed",
         nullptr);
  }
  return site.address;
}

void* Scheduler::dynamic_shared(size_t alignment) {
  if (alignment > 16)
    fail("dynamic shared memory is aligned to 16 bytes only; the type needs " + std::to_string(alignment),
         nullptr);
  return block_.arena.dynamic();
}

std::string Scheduler::describe_running() const {
  return std::string("kernel ") + shape_.kernel + ", block " + text(block_.index) + ", thread " +
         text(running_->index);
}

void Scheduler::fail(const std::string& message, const Location* where) {
  failure_ = describe_running() + (where == nullptr ? "" : ", " + text(*where)) + ": " + message;
  failed_ = true;
  suspend();
  // abandon_all() resets this fibre, so execution never returns here.
  std::abort();
}

void Scheduler::abandon_all() {
  for (Thread& thread : threads_) {
    if (thread.fibre != nullptr) fibres_.abandon(thread.fibre);
    thread.fibre = nullptr;
  }
  free_groups_.clear();
  for (const auto& group : groups_) free_groups_.push_back(group.get());
  running_block_serial = 0;
}

void set_order(Order order, uint64_t seed) {
  const std::lock_guard lock(launch_mutex());
  scheduler().set_order(order, seed);
}

uint64_t launch_count() {
  const std::lock_guard lock(launch_mutex());
  return scheduler().launches();
}

void run_grid(const LaunchShape& shape, void (*thread_main)(const void* call), const void* call) {
  thread_local bool launching = false;
  if (launching) throw std::runtime_error("a kernel cannot launch another kernel");
  const std::lock_guard lock(launch_mutex());
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_set_death_callback(print_running_thread);
#endif
  const race_check::Pause pause;
  launching = true;
  try {
    scheduler().run(shape, thread_main, call);
  } catch (...) {
    launching = false;
    throw;
  }
  launching = false;
}

void block_barrier(const Location& where) {
  const race_check::Pause pause;
  scheduler().block_barrier(where);
}
const WarpGroup* warp_arrive(WarpOp op, uint32_t mask, uint64_t payload, const Location& where) {
  const race_check::Pause pause;
  return scheduler().warp_arrive(op, mask, payload, where);
}
void warp_leave(const WarpGroup* group) {
  const race_check::Pause pause;
  scheduler().warp_leave(group);
}
unsigned int lane_of_this_thread() {
  return scheduler().lane();
}
void fail(const std::string& message, const Location& where) {
  const race_check::Pause pause;
  scheduler().fail(message, &where);
}
void yield_thread() {
  const race_check::Pause pause;
  scheduler().yield();
}
void* place_shared(SharedSite& site, size_t bytes, size_t alignment) {
  const race_check::Pause pause;
  return scheduler().place_shared(site, bytes, alignment);
}
void* dynamic_shared(size_t alignment) {
  const race_check::Pause pause;
  return scheduler().dynamic_shared(alignment);
}

}  // namespace panfpn::cuda_on_host

// C interface for ctypes.
extern "C" __attribute__((visibility("default"))) void panfpn_host_set_order(int order,
                                                                             unsigned long long seed) {
  panfpn::cuda_on_host::set_order(static_cast<panfpn::cuda_on_host::Order>(order), seed);
}
extern "C" __attribute__((visibility("default"))) unsigned long long panfpn_host_launch_count() {
  return panfpn::cuda_on_host::launch_count();
}
