// Fibres: stacks that the scheduler switches between by hand, one per running CUDA thread of the host run.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

namespace panfpn::cuda_on_host {

// Saved state of a suspended stack. `bottom` and `bytes` are what AddressSanitizer wants to know of the stack
// that is switched to, `fake_stack` what it keeps for a stack that is left.
struct Context {
  void* stack_pointer = nullptr;
  void* machine = nullptr;  // ucontext_t, where there is no assembly for the processor
  const void* bottom = nullptr;
  size_t bytes = 0;
  void* fake_stack = nullptr;
};

// Leaves `from` (the running one) and continues `to`; returns when somebody switches back to `from`.
void switch_context(Context& from, Context& to);

using FibreMain = void (*)();

struct Fibre {
  Context context;
  char* stack = nullptr;  // lowest address
  size_t index = 0;
};

// Stacks are mapped once and reused; below each lies a page without access, so that an overflow faults.
class FibrePool {
 public:
  explicit FibrePool(FibreMain main) : main_(main) {}
  FibrePool(const FibrePool&) = delete;
  FibrePool& operator=(const FibrePool&) = delete;

  // The fibre given back last: its stack is still in the cache.
  Fibre* take();
  // A fibre that is suspended in its main loop, ready for another thread.
  void give_back(Fibre* fibre) { free_.push_back(fibre); }
  // A fibre that was left in the middle of a kernel: it starts afresh.
  void abandon(Fibre* fibre);

 private:
  void grow();
  void prepare(Fibre& fibre);

  FibreMain main_;
  std::vector<std::unique_ptr<Fibre>> fibres_;
  std::vector<Fibre*> free_;
};

// To be called first thing by the fibre's main function.
void enter_fibre();

}  // namespace panfpn::cuda_on_host
