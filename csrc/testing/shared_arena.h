// The shared memory of one block in the host run.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "testing/scheduler.h"

namespace panfpn::cuda_on_host {

// Arrays lie between guard zones, each at the least alignment that its type asks for, and start as 0xFF
// bytes: a NaN for floats, -1 for integers. AddressSanitizer reports any access to a guard zone where it
// happens; without it, a write is found when the block ends.
class SharedArena {
 public:
  SharedArena();
  ~SharedArena();
  SharedArena(const SharedArena&) = delete;
  SharedArena& operator=(const SharedArena&) = delete;

  // Forgets the last block's arrays.
  void reset(size_t dynamic_bytes);
  void* dynamic() const { return base_ + kDynamicOffset; }
  // Where the site's array lies in this block; placed at the first call.
  void* place(const SharedSite& site, size_t bytes, size_t alignment);
  size_t static_bytes() const { return static_bytes_; }
  // Name of an array beyond whose bounds something was written.
  std::optional<std::string> damaged() const;

 private:
  static constexpr size_t kGuardBytes = 128;
  static constexpr size_t kArenaBytes = 1024 * 1024;
  // 16 bytes is all that dynamic shared memory promises, so it lies at no multiple of 32.
  static constexpr size_t kDynamicOffset = kGuardBytes + 16;

  struct Array {
    const SharedSite* site;  // nullptr: the dynamic one
    char* begin;
    size_t bytes;
  };

  // Makes [cursor_, begin) and the guard zone after the array unusable.
  void add(const SharedSite* site, char* begin, size_t bytes);

  char* base_;
  char* cursor_;
  size_t static_bytes_ = 0;
  std::vector<Array> arrays_;
};

}  // namespace panfpn::cuda_on_host
