// Labels occur in runs: a row of a segment has one pair of labels. So the length of a run is counted in a
// register, and the hash table is accessed only when the pair changes.
#include "metrics/label_pairs.h"

#include <algorithm>
#include <cstring>

namespace panfpn::inline PANFPN_ARITHMETIC {
namespace {

// Counts by key, in a hash table with open addressing that is at most half full.
class PairCounts {
 public:
  void add(uint64_t key, int64_t count) {
    Slot& slot = find(key);
    if (slot.count == 0) {
      slot.key = key;
      ++used_;
    }
    slot.count += count;
    if (2 * used_ > slots_.size()) grow();
  }

  std::vector<LabelPair> sorted() const {
    std::vector<LabelPair> pairs;
    pairs.reserve(used_);
    for (const Slot& slot : slots_) {
      if (slot.count > 0) {
        pairs.push_back({static_cast<uint32_t>(slot.key >> 32), static_cast<uint32_t>(slot.key), slot.count});
      }
    }
    std::sort(pairs.begin(), pairs.end(), [](const LabelPair& a, const LabelPair& b) {
      return a.first != b.first ? a.first < b.first : a.second < b.second;
    });
    return pairs;
  }

 private:
  struct Slot {
    uint64_t key;
    int64_t count;  // 0 if the slot is free
  };

  Slot& find(uint64_t key) {
    // The upper bits of the product depend on all bits of the key (Fibonacci hashing).
    size_t i = static_cast<size_t>(key * 0x9E3779B97F4A7C15ULL >> 32) & (slots_.size() - 1);
    while (slots_[i].count > 0 && slots_[i].key != key) i = (i + 1) & (slots_.size() - 1);
    return slots_[i];
  }

  void grow() {
    const std::vector<Slot> old = std::move(slots_);
    slots_.assign(2 * old.size(), Slot{});
    for (const Slot& slot : old) {
      if (slot.count > 0) find(slot.key) = slot;
    }
  }

  std::vector<Slot> slots_ = std::vector<Slot>(256);
  size_t used_ = 0;
};

struct Rgb {
  const uint8_t* data;
  uint32_t operator[](int64_t i) const {
    const uint8_t* pixel = data + 3 * i;
    return pixel[0] | pixel[1] << 8 | pixel[2] << 16;
  }
};

struct Int32 {
  const int32_t* data;
  uint32_t operator[](int64_t i) const { return static_cast<uint32_t>(data[i]); }
};

template <typename First, typename Second>
std::vector<LabelPair> count(First first, Second second, int64_t pixels) {
  PairCounts counts;
  for (int64_t i = 0; i < pixels;) {
    const uint32_t a = first[i], b = second[i];
    const int64_t begin = i++;
    while (i < pixels && first[i] == a && second[i] == b) ++i;
    counts.add(static_cast<uint64_t>(a) << 32 | b, i - begin);
  }
  return counts.sorted();
}

template <typename First>
std::vector<LabelPair> count_first(First first, LabelMap second, int64_t pixels) {
  if (second.is_rgb) return count(first, Rgb{static_cast<const uint8_t*>(second.data)}, pixels);
  return count(first, Int32{static_cast<const int32_t*>(second.data)}, pixels);
}

}  // namespace

std::vector<LabelPair> count_label_pairs(LabelMap first, LabelMap second, int64_t pixels) {
  if (first.is_rgb) return count_first(Rgb{static_cast<const uint8_t*>(first.data)}, second, pixels);
  return count_first(Int32{static_cast<const int32_t*>(first.data)}, second, pixels);
}

}  // namespace panfpn::inline PANFPN_ARITHMETIC
