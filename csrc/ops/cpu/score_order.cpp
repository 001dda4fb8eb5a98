// A radix sort of the bits of the scores. It takes tens of microseconds for ten thousand boxes; a comparison
// sort would take longer than the suppression that follows.
#include "ops/cpu/score_order.h"

#include <algorithm>
#include <array>
#include <memory>
#include <utility>

#include "ops/nms.h"

namespace panfpn::inline PANFPN_ARITHMETIC {
namespace {

constexpr int kDigitBits = 8;
constexpr int64_t kDigits = 1 << kDigitBits;
// For fewer boxes, counting digits takes longer than comparing.
constexpr int64_t kSmall = 48;

template <typename Key>
struct Entry {
  Key key;
  uint32_t index;
};

template <typename T>
void order_as(const T* scores, int64_t count, uint32_t* order) {
  using Key = sort_key_t<T>;
  constexpr int kPasses = 8 * sizeof(Key) / kDigitBits;
  const auto buffer = std::make_unique_for_overwrite<Entry<Key>[]>(2 * count);
  Entry<Key>*from = buffer.get(), *to = from + count;
  for (int64_t i = 0; i < count; ++i) {
    from[i] = {descending_key(scores[i]), static_cast<uint32_t>(i)};
  }
  if (count <= kSmall) {
    std::sort(from, from + count, [](const Entry<Key>& a, const Entry<Key>& b) {
      return a.key < b.key || (a.key == b.key && a.index < b.index);
    });
  } else {
    std::array<std::array<uint32_t, kDigits>, kPasses> counts{};
    for (int64_t i = 0; i < count; ++i) {
      for (int pass = 0; pass < kPasses; ++pass) {
        ++counts[pass][from[i].key >> (pass * kDigitBits) & (kDigits - 1)];
      }
    }
    for (int pass = 0; pass < kPasses; ++pass) {
      auto& starts = counts[pass];
      const int shift = pass * kDigitBits;
      if (starts[from[0].key >> shift & (kDigits - 1)] == count) continue;  // all keys have the same digit
      uint32_t next = 0;
      for (uint32_t& start : starts) next += std::exchange(start, next);
      for (int64_t i = 0; i < count; ++i) to[starts[from[i].key >> shift & (kDigits - 1)]++] = from[i];
      std::swap(from, to);
    }
  }
  for (int64_t i = 0; i < count; ++i) order[i] = from[i].index;
}

}  // namespace

void order_by_score(const void* scores, ScalarType dtype, int64_t count, uint32_t* order) {
  dispatch_float_or_double(dtype, "nms", [&](auto tag) {
    order_as(static_cast<const typename decltype(tag)::type*>(scores), count, order);
  });
}

}  // namespace panfpn::inline PANFPN_ARITHMETIC
