// The order in which suppression visits boxes.
#pragma once

#include <cstdint>

#include "stable_compat.h"

namespace panfpn {

// Writes to `order` the indices of `scores` (float32 or float64) by descending score: NaN first, equal ones
// in their given order, as a stable torch.sort has them.
void order_by_score(const void* scores, ScalarType dtype, int64_t count, uint32_t* order);

}  // namespace panfpn
