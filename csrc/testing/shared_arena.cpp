#include "testing/shared_arena.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <new>

#include "testing/race_check.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace panfpn::cuda_on_host {
namespace {

constexpr unsigned char kPoison = 0xFF;
#if !defined(__SANITIZE_ADDRESS__)
constexpr unsigned char kGuard = 0xB7;
#endif

void make_guard([[maybe_unused]] char* begin, [[maybe_unused]] char* end) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(begin, static_cast<size_t>(end - begin));
#else
  std::memset(begin, kGuard, static_cast<size_t>(end - begin));
#endif
}

bool guard_is_intact([[maybe_unused]] const char* begin, [[maybe_unused]] const char* end) {
#if defined(__SANITIZE_ADDRESS__)
  return true;
#else
  return std::all_of(begin, end, [](char byte) { return static_cast<unsigned char>(byte) == kGuard; });
#endif
}

// Maps memory, in place of the mapping at `address` unless it is null.
char* map_memory(char* address) {
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | (address == nullptr ? 0 : MAP_FIXED);
  void* const mapping = mmap(address, SharedArena::kArenaBytes, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (mapping == MAP_FAILED) throw std::bad_alloc();
  return static_cast<char*>(mapping);
}

}  // namespace

SharedArena::SharedArena() : base_(map_memory(nullptr)), cursor_(base_) {}

SharedArena::~SharedArena() {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(base_, kArenaBytes);
#endif
  munmap(base_, kArenaBytes);
}

void SharedArena::reset(size_t dynamic_bytes) {
  // For ThreadSanitizer, newly mapped memory has not been accessed.
  if constexpr (race_check::kEnabled) map_memory(base_);
  arrays_.clear();
  static_bytes_ = 0;
  cursor_ = base_;
  add(nullptr, base_ + kDynamicOffset, dynamic_bytes);
}

void* SharedArena::place(const SharedSite& site, size_t bytes, size_t alignment) {
  for (const Array& array : arrays_) {
    if (array.site == &site) return array.begin;
  }
  const auto cursor = reinterpret_cast<uintptr_t>(cursor_);
  uintptr_t begin = (cursor + alignment - 1) / alignment * alignment;
  if (begin % (2 * alignment) == 0) begin += alignment;
  add(&site, reinterpret_cast<char*>(begin), bytes);
  static_bytes_ += bytes;
  return reinterpret_cast<char*>(begin);
}

void SharedArena::add(const SharedSite* site, char* begin, size_t bytes) {
  char* end = begin + bytes;
  // A kernel may declare more shared memory than a block can have. The caller reports that only afterwards,
  // so the arena must be large enough until then.
  if (end + kGuardBytes > base_ + kArenaBytes) throw std::bad_alloc();
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(begin, bytes);
#endif
  std::memset(begin, kPoison, bytes);
  make_guard(cursor_, begin);
  make_guard(end, end + kGuardBytes);
  arrays_.push_back({site, begin, bytes});
  cursor_ = end + kGuardBytes;
}

std::optional<std::string> SharedArena::damaged() const {
  const char* guard = base_;
  for (const Array& array : arrays_) {
    const char* end = array.begin + array.bytes;
    if (!guard_is_intact(guard, array.begin) || !guard_is_intact(end, end + kGuardBytes)) {
      return array.site == nullptr ? "the dynamic shared memory"
                                   : std::string("shared array ") + array.site->name;
    }
    guard = end + kGuardBytes;
  }
  return std::nullopt;
}

}  // namespace panfpn::cuda_on_host
