// The order in which suppression visits boxes.
#pragma once

#include <cstdint>

#include "stable_compat.h"

namespace panfpn::inline PANFPN_ARITHMETIC {

// Writes the indices of `scores` (float32 or float64) to `order` by descending score, as a stable torch.sort
// orders them: NaN first, equal scores in their given order.
void order_by_score(const void* scores, ScalarType dtype, int64_t count, uint32_t* order);

}  // namespace panfpn::inline PANFPN_ARITHMETIC
