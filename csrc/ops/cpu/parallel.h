// Parallel work that is divided dynamically.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "stable_compat.h"

namespace panfpn::inline PANFPN_ARITHMETIC {

// Calls make_worker() once in each thread, and its result with chunks [begin, end) of the work whenever the
// thread is free. For items whose costs differ too much to divide them in advance.
template <typename MakeWorker>
void parallel_in_chunks(int64_t count, int64_t chunk, const MakeWorker& make_worker) {
  std::atomic<int64_t> next{0};
  const int64_t chunks = (count + chunk - 1) / chunk;
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), chunks);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    if (first == last) return;
    auto worker = make_worker();
    for (int64_t i = next.fetch_add(1); i < chunks; i = next.fetch_add(1)) {
      worker(i * chunk, std::min(count, (i + 1) * chunk));
    }
  });
}

}  // namespace panfpn::inline PANFPN_ARITHMETIC
