// Fibres (user-level threads). Each running CUDA thread of the host run has one, and the scheduler switches
// between them.
#pragma once

#include <cstddef>
#include <deque>
#include <memory>
#include <vector>

namespace panfpn::cuda_on_host {

// Saved state of a suspended stack. AddressSanitizer needs `bottom` and `bytes` of a stack to switch to it,
// and stores `fake_stack` for a stack when it is suspended.
struct Context {
  void* stack_pointer = nullptr;
  void* machine = nullptr;  // ucontext_t, on processors for which there is no assembly
  const void* bottom = nullptr;
  size_t bytes = 0;
  void* fake_stack = nullptr;
  void* checked = nullptr;  // the fibre as ThreadSanitizer knows it
};

// Suspends the running context `from` and resumes `to`. Returns when another context switches back to `from`.
void switch_context(Context& from, Context& to);

using FibreMain = void (*)();

struct Fibre {
  Context context;
  char* stack = nullptr;  // lowest address
  size_t index = 0;
};

// Owns the fibres. Stacks are mapped once and reused. The page below each stack is inaccessible, so that a
// stack overflow faults.
class FibrePool {
 public:
  explicit FibrePool(FibreMain main) : main_(main) {}
  FibrePool(const FibrePool&) = delete;
  FibrePool& operator=(const FibrePool&) = delete;

  // Returns the fibre that was given back last, because its stack is still in the cache. The race check gets
  // the one that was given back first: it does not find races between threads that ran on one fibre.
  Fibre* take();
  // Takes back a fibre that is suspended in its main loop and ready for another thread.
  void give_back(Fibre* fibre) { free_.push_back(fibre); }
  // Takes back a fibre that is suspended inside a kernel and resets it to the start of its main function.
  void abandon(Fibre* fibre);

 private:
  void grow();
  void prepare(Fibre& fibre);

  FibreMain main_;
  std::vector<std::unique_ptr<Fibre>> fibres_;
  std::deque<Fibre*> free_;
};

// The main function of a fibre must call this first.
void enter_fibre();

}  // namespace panfpn::cuda_on_host
