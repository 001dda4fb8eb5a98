// Huge pages under what an op writes once.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace panfpn {

// Asks for huge pages under a large fresh allocation. The output is written once, and most of that time would
// go into 4 KiB page faults (100 masks of 800 x 1333: 68 of 88 ms on one core). Only a hint: a failure
// changes nothing.
inline void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096;
  constexpr int64_t kWorthIt = int64_t{1} << 22;
  if (bytes < kWorthIt) return;
  const uintptr_t address = reinterpret_cast<uintptr_t>(data), begin = (address + kPage - 1) / kPage * kPage;
  const uintptr_t end = (address + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace panfpn
