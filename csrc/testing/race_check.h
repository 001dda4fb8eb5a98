// Describes CUDA threads to ThreadSanitizer, which then finds races between them: which fibre is running, and
// which operations order memory. Barriers, __syncwarp, and the start and the end of a launch order it;
// shuffles, votes and reductions do not. Atomics do not race with each other.
//
// With PANFPN_RACE_CHECK, compile the kernels with -fsanitize=thread and the harness without, and preload
// libtsan. Otherwise all of this does nothing.
#pragma once

#include <array>
#include <cstddef>
#include <memory>

#if defined(PANFPN_RACE_CHECK)
#include <sanitizer/tsan_interface.h>

extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}

// The harness' functions in headers are compiled with the kernels, but must not be checked.
#define PANFPN_UNCHECKED __attribute__((no_sanitize("thread"), noinline))
#else
#define PANFPN_UNCHECKED
#endif

namespace panfpn::cuda_on_host::race_check {

#if defined(PANFPN_RACE_CHECK)

inline constexpr bool kEnabled = true;

// Orders what this thread did before after_all(token) of any thread.
inline void before_all(void* token) {
  __tsan_release(token);
}
inline void after_all(void* token) {
  __tsan_acquire(token);
}

inline void* running_fibre() {
  return __tsan_get_current_fiber();
}
inline void* make_fibre() {
  return __tsan_create_fiber(0);
}
inline void name_fibre(void* fibre, const char* name) {
  __tsan_set_fiber_name(fibre, name);
}
inline void switch_to(void* fibre) {
  __tsan_switch_to_fiber(fibre, __tsan_switch_to_fiber_no_sync);
}

// While it exists, nothing that the running thread reads or writes is checked. Memory that is allocated and
// freed counts as written otherwise.
struct Pause {
  Pause() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Pause() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
  Pause(const Pause&) = delete;
  Pause& operator=(const Pause&) = delete;
};

// Marks an object of 4-byte words as accessed by an atomic.
template <typename T>
void mark_atomic(T* address) {
  auto* const words = reinterpret_cast<unsigned int*>(address);
  for (size_t i = 0; i < sizeof(T) / sizeof(unsigned int); ++i) {
    __atomic_fetch_add(words + i, 0u, __ATOMIC_RELAXED);
  }
}

#else

inline constexpr bool kEnabled = false;

inline void before_all(void*) {}
inline void after_all(void*) {}
inline void* running_fibre() {
  return nullptr;
}
inline void* make_fibre() {
  return nullptr;
}
inline void name_fibre(void*, const char*) {}
inline void switch_to(void*) {}
struct Pause {
  Pause() {}
};
template <typename T>
void mark_atomic(T*) {}

#endif

// A place where threads wait for each other, again and again. A thread may arrive for the next time before
// all threads have left, so that two tokens take turns. A token is made anew each time; otherwise it would
// also order what happened in earlier turns.
class MeetingPoint {
 public:
  // Called by each thread that arrives. Returns the token that the thread passes to after_all() once it
  // resumes. `first` is true for the first thread to arrive.
  void* arrive([[maybe_unused]] bool first) {
    if constexpr (kEnabled) {
      if (first) {
        turn_ = 1 - turn_;
        tokens_[turn_] = std::make_unique<char>();
      }
      before_all(tokens_[turn_].get());
      return tokens_[turn_].get();
    }
    return nullptr;
  }

 private:
  std::array<std::unique_ptr<char>, 2> tokens_;
  size_t turn_ = 0;
};

}  // namespace panfpn::cuda_on_host::race_check
