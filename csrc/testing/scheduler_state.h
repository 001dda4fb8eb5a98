// The threads, warps and block that run: state of the scheduler and input of its reports.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "testing/fibre.h"
#include "testing/race_check.h"
#include "testing/scheduler.h"
#include "testing/shared_arena.h"

namespace panfpn::cuda_on_host {

enum class Wait : uint8_t { none, block, warp };

struct Thread {
  uint3 index;
  uint32_t linear;
  Fibre* fibre;
  bool finished;
  Wait wait;
  Location where;
  const WarpGroup* group;
};

struct Warp {
  uint32_t lanes;  // mask of the lanes that exist: the last warp of a block may be partial
  uint32_t exited;
  std::vector<WarpGroup*> pending;
};

struct Block {
  uint3 index;
  uint64_t serial;
  int live;
  int arrived;
  Location where;
  race_check::MeetingPoint barrier;
  std::vector<Warp> warps;
  SharedArena arena;
};

// Set of runnable threads as a bit set, so that finding the next one takes a few instructions.
class ReadySet {
 public:
  void fill(size_t size) {
    size_ = size;
    words_.assign((size + 63) / 64, ~uint64_t{0});
    if (size % 64 != 0) words_.back() = (uint64_t{1} << (size % 64)) - 1;
    first_word_ = 0;
  }
  void insert(size_t i) {
    words_[i / 64] |= uint64_t{1} << (i % 64);
    first_word_ = std::min(first_word_, i / 64);
  }
  void erase(size_t i) { words_[i / 64] &= ~(uint64_t{1} << (i % 64)); }

  // Returns the first member, or size() if the set is empty.
  size_t first() {
    while (first_word_ < words_.size() && words_[first_word_] == 0) ++first_word_;
    if (first_word_ == words_.size()) return size_;
    return first_word_ * 64 + static_cast<size_t>(__builtin_ctzll(words_[first_word_]));
  }
  // Returns the first member at or after `start`, or else the first one of all.
  size_t first_from(size_t start) {
    const uint64_t rest = words_[start / 64] & (~uint64_t{0} << (start % 64));
    if (rest != 0) return start / 64 * 64 + static_cast<size_t>(__builtin_ctzll(rest));
    for (size_t w = start / 64 + 1; w < words_.size(); ++w) {
      if (words_[w] != 0) return w * 64 + static_cast<size_t>(__builtin_ctzll(words_[w]));
    }
    return first();
  }
  size_t size() const { return size_; }

 private:
  std::vector<uint64_t> words_;
  size_t size_ = 0;
  size_t first_word_ = 0;
};

// Texts for messages: a warp function, an index, a location in the source, a set of lanes.
const char* name_of(WarpOp op);
std::string text(uint3 v);
std::string text(const Location& where);
std::string hex(uint32_t mask);

// Message that lists where the unfinished threads wait.
std::string deadlock_report(const char* kernel, uint3 block, const std::vector<Thread>& threads);

// Main function of all fibres: runs one thread after another.
void fibre_main();

class Scheduler {
 public:
  void run(const LaunchShape& shape, void (*thread_main)(const void*), const void* call);
  void set_order(Order order, uint64_t seed);
  uint64_t launches() const { return launches_; }

  // The functions from here on are called by the fibres.
  void run_body();
  void exit_thread();
  void block_barrier(const Location& where);
  const WarpGroup* warp_arrive(WarpOp op, uint32_t mask, uint64_t payload, const Location& where);
  void warp_leave(const WarpGroup* group);
  void yield();
  void* place_shared(SharedSite& site, size_t bytes, size_t alignment);
  void* dynamic_shared(size_t alignment);
  [[noreturn]] void fail(const std::string& message, const Location* where);
  unsigned int lane() const { return running_->linear % 32; }
  bool inside() const { return running_ != nullptr; }
  std::string describe_running() const;

 private:
  void check(const LaunchShape& shape) const;
  void read_environment();
  void prepare();
  void start_block(uint64_t ordinal);
  void run_block();
  Thread* next_thread();
  void wait(Wait kind, const Location& where, const WarpGroup* group);
  void suspend() { switch_context(running_->fibre->context, host_); }
  void release_block();
  void release_group(Warp& warp, size_t warp_index, size_t group_index);
  void set_ready(size_t thread);
  void progress() { atomics_without_progress_ = 0; }
  void set_budget();
  void abandon_all();
  uint64_t random();
  size_t index_of(const Thread& thread) const { return static_cast<size_t>(&thread - threads_.data()); }
  size_t position(size_t thread) const {
    return order_ == Order::reverse ? threads_.size() - 1 - thread : thread;
  }

  Order order_ = Order::forward;
  uint64_t seed_ = 0;
  bool order_known_ = false;
  uint64_t random_state_ = 0;
  uint64_t launches_ = 0;
  uint64_t block_serial_ = 0;

  LaunchShape shape_{};
  void (*thread_main_)(const void*) = nullptr;
  const void* call_ = nullptr;
  size_t threads_per_block_ = 0;

  Context host_;
  FibrePool fibres_{fibre_main};
  Block block_;
  std::vector<Thread> threads_;
  ReadySet ready_;
  std::vector<size_t> yielded_;
  std::vector<std::unique_ptr<WarpGroup>> groups_;
  std::vector<WarpGroup*> free_groups_;
  size_t live_ = 0;
  char begins_ = 0, ends_ = 0;  // tokens for what happened before a launch, and for what its threads did
  int64_t atomics_granted_ = 0;
  int64_t atomics_without_progress_ = 0;

  Thread* running_ = nullptr;
  bool failed_ = false;
  std::string failure_;
};

}  // namespace panfpn::cuda_on_host
