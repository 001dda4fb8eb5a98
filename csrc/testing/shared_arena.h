// Shared memory of one block in the host run.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "testing/scheduler.h"

namespace panfpn::cuda_on_host {

// Each array is placed between guard zones at exactly the alignment that its type requires, and is filled
// with 0xFF bytes: NaN for floats, -1 for integers. AddressSanitizer reports any access to a guard zone when
// it happens. Without AddressSanitizer, a write to a guard zone is found when the block ends.
class SharedArena {
 public:
  static constexpr size_t kArenaBytes = 1024 * 1024;

  SharedArena();
  ~SharedArena();
  SharedArena(const SharedArena&) = delete;
  SharedArena& operator=(const SharedArena&) = delete;

  // Removes the arrays of the previous block.
  void reset(size_t dynamic_bytes);
  void* dynamic() const { return base_ + kDynamicOffset; }
  // Returns the address of the site's array in this block. The first call allocates the array.
  void* place(const SharedSite& site, size_t bytes, size_t alignment);
  size_t static_bytes() const { return static_bytes_; }
  // Name of an array outside of whose bounds a write happened; nullopt if there was no such write.
  std::optional<std::string> damaged() const;

 private:
  static constexpr size_t kGuardBytes = 128;
  // Dynamic shared memory is aligned to 16 bytes only, so it must not be at a multiple of 32.
  static constexpr size_t kDynamicOffset = kGuardBytes + 16;

  struct Array {
    const SharedSite* site;  // nullptr: the dynamic one
    char* begin;
    size_t bytes;
  };

  // Appends an array and turns [cursor_, begin) and the bytes after the array into guard zones.
  void add(const SharedSite* site, char* begin, size_t bytes);

  char* base_;
  char* cursor_;
  size_t static_bytes_ = 0;
  std::vector<Array> arrays_;
};

}  // namespace panfpn::cuda_on_host
