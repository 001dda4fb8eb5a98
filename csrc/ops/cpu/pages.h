// The pages under what an op writes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <span>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace panfpn {

// The whole pages of some memory.
inline std::span<uint8_t> pages_of(void* data, int64_t bytes) {
  constexpr uintptr_t kPage = 4096;
  const uintptr_t address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (address + kPage - 1) / kPage * kPage;
  const uintptr_t end = (address + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  return {reinterpret_cast<uint8_t*>(begin), end > begin ? end - begin : 0};
}

// Asks for huge pages under a large fresh allocation. The output is written once, and most of that time would
// go into 4 KiB page faults (100 masks of 800 x 1333: 68 of 88 ms on one core). Only a hint: a failure
// changes nothing.
inline void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kWorthIt = int64_t{1} << 22;
  if (bytes < kWorthIt) return;
  const std::span<uint8_t> pages = pages_of(data, bytes);
  madvise(pages.data(), pages.size(), MADV_HUGEPAGE);
#endif
}

// Makes a large allocation zero without touching it, and says whether that worked: the kernel then provides
// zeros at the first touch. No more than it does anyway where the allocation is fresh, as it is above the
// largest size that glibc's malloc keeps for itself. Memory that is mapped in a way that nobody gives to
// malloc (a shared file) would keep its contents; the first page is a probe for that.
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

}  // namespace panfpn
