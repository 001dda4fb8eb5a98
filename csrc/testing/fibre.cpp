#include "testing/fibre.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <new>

#include "testing/race_check.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__) || defined(PANFPN_HOST_UCONTEXT)
#define PANFPN_SWITCH_BY_UCONTEXT
#include <ucontext.h>
#endif

namespace panfpn::cuda_on_host {
namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 512 * 1024;  // red zones make stack frames several times larger
#else
constexpr size_t kStackBytes = 128 * 1024;
#endif
constexpr size_t kFibresPerMapping = 64;
// The race check finds all races of launches with at most so many threads.
constexpr size_t kCheckedThreads = 2048;

// The context that the last switch suspended. AddressSanitizer reports the bounds of its stack after the
// switch.
Context* switched_from = nullptr;

}  // namespace

#if defined(PANFPN_SWITCH_BY_UCONTEXT)

namespace {
void switch_machine(Context& from, Context& to) {
  if (from.machine == nullptr) from.machine = new ucontext_t;
  swapcontext(static_cast<ucontext_t*>(from.machine), static_cast<ucontext_t*>(to.machine));
}
void prepare_machine(Context& context, char* stack, size_t bytes, FibreMain main) {
  if (context.machine == nullptr) context.machine = new ucontext_t;
  auto* machine = static_cast<ucontext_t*>(context.machine);
  getcontext(machine);
  machine->uc_stack.ss_sp = stack;
  machine->uc_stack.ss_size = bytes;
  machine->uc_link = nullptr;
  makecontext(machine, main, 0);
}
}  // namespace

#else

// Saves the callee-saved registers (System V ABI) on the old stack and restores them from the new one. The
// rounding mode and exception masks of the floating-point unit are not saved, because no kernel changes them.
extern "C" void panfpn_switch_stack(void** save, void* load);
asm(R"(
.text
.p2align 4
.globl panfpn_switch_stack
.hidden panfpn_switch_stack
.type panfpn_switch_stack, @function
panfpn_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size panfpn_switch_stack, .-panfpn_switch_stack
)");

namespace {
void switch_machine(Context& from, Context& to) {
  panfpn_switch_stack(&from.stack_pointer, to.stack_pointer);
}
void prepare_machine(Context& context, char* stack, size_t bytes, FibreMain main) {
  // The initial stack holds six zeroed registers, the address of `main` as the return address of the switch,
  // and a zero as the return address of `main`, where unwinders stop. On entry to `main` the stack pointer is
  // then 8 below a multiple of 16, as the ABI requires.
  auto* top = reinterpret_cast<uintptr_t*>(stack + bytes);
  uintptr_t* start = top - 8;
  std::memset(start, 0, 8 * sizeof(uintptr_t));
  start[6] = reinterpret_cast<uintptr_t>(main);
  context.stack_pointer = start;
}
}  // namespace

#endif

void switch_context(Context& from, Context& to) {
  switched_from = &from;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from.fake_stack, to.bottom, to.bytes);
#endif
  race_check::switch_to(to.checked);
  switch_machine(from, to);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake_stack, &switched_from->bottom, &switched_from->bytes);
#endif
}

void enter_fibre() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &switched_from->bottom, &switched_from->bytes);
#endif
}

Fibre* FibrePool::take() {
  if (free_.empty() || (race_check::kEnabled && fibres_.size() < kCheckedThreads)) grow();
  Fibre* fibre = race_check::kEnabled ? free_.front() : free_.back();
  race_check::kEnabled ? free_.pop_front() : free_.pop_back();
  if (fibre->context.checked == nullptr) fibre->context.checked = race_check::make_fibre();
  return fibre;
}

void FibrePool::abandon(Fibre* fibre) {
  fibre->context.checked = nullptr;  // it may be in a race_check::Pause
  prepare(*fibre);
  free_.push_back(fibre);
}

void FibrePool::grow() {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t stride = kStackBytes + page;
  void* mapping = mmap(nullptr, stride * kFibresPerMapping, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) throw std::bad_alloc();
  for (size_t i = 0; i < kFibresPerMapping; ++i) {
    char* slot = static_cast<char*>(mapping) + i * stride;
    if (mprotect(slot, page, PROT_NONE) != 0) throw std::bad_alloc();
    auto fibre = std::make_unique<Fibre>();
    fibre->stack = slot + page;
    fibre->index = fibres_.size();
    prepare(*fibre);
    fibres_.push_back(std::move(fibre));
  }
  // take() pops from the back, so push in descending order to hand out the lowest index first.
  for (size_t i = 0; i < kFibresPerMapping; ++i) free_.push_back(fibres_[fibres_.size() - 1 - i].get());
}

void FibrePool::prepare(Fibre& fibre) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(fibre.stack, kStackBytes);
#endif
  // Stacks are a whole number of pages apart. Without an offset their tops would map to the same few cache
  // sets.
  const size_t colour = (fibre.index % 32) * 128;
  const size_t bytes = kStackBytes - colour;
  fibre.context.bottom = fibre.stack;
  fibre.context.bytes = bytes;
  fibre.context.fake_stack = nullptr;
  prepare_machine(fibre.context, fibre.stack, bytes, main_);
}

}  // namespace panfpn::cuda_on_host
