// The memory pages of an op's output.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <span>

#include "arithmetic.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace panfpn::inline PANFPN_ARITHMETIC {

// The whole pages within a piece of memory.
inline std::span<uint8_t> pages_of(void* data, int64_t bytes) {
  constexpr uintptr_t kPage = 4096;
  const uintptr_t address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (address + kPage - 1) / kPage * kPage;
  const uintptr_t end = (address + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  return {reinterpret_cast<uint8_t*>(begin), end > begin ? end - begin : 0};
}

// Asks for huge pages under a large fresh allocation. An output is written once, and most of that time would
// be spent in faults of 4 KiB pages (100 masks of 800 x 1333: 68 of 88 ms on one core). This is only a hint:
// a failure changes nothing.
inline void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kWorthIt = int64_t{1} << 22;
  if (bytes < kWorthIt) return;
  const std::span<uint8_t> pages = pages_of(data, bytes);
  madvise(pages.data(), pages.size(), MADV_HUGEPAGE);
#endif
}

// Sets a large allocation to zero without touching it, and returns whether this worked: the kernel then
// provides pages of zeros at the first touch. This costs nothing extra if the allocation is fresh, as it is
// above the largest size that glibc's malloc keeps for reuse. Memory that is mapped in a way that no malloc
// uses (a shared file) would keep its contents; the write to the first page detects this.
inline bool zero_at_first_touch([[maybe_unused]] uint8_t* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  constexpr int64_t kAlwaysFresh = int64_t{1} << 25;
  if (bytes <= kAlwaysFresh) return false;
  const std::span<uint8_t> pages = pages_of(data, bytes);
  volatile uint8_t* probe = pages.data();
  *probe = 1;
  if (madvise(pages.data(), pages.size(), MADV_DONTNEED) != 0 || *probe != 0) return false;
  std::memset(data, 0, static_cast<size_t>(pages.data() - data));
  uint8_t* const behind = pages.data() + pages.size();
  std::memset(behind, 0, static_cast<size_t>(data + bytes - behind));
  return true;
#else
  return false;
#endif
}

}  // namespace panfpn::inline PANFPN_ARITHMETIC
