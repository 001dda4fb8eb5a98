// A half-open range of rows, columns, pixels or samples.
#pragma once

#include <cstdint>

#include "ops/host_device.h"

namespace panfpn::inline PANFPN_ARITHMETIC {

struct Range {
  int64_t begin, end;

  PANFPN_HOST_DEVICE int64_t size() const { return end - begin; }
};

}  // namespace panfpn::inline PANFPN_ARITHMETIC
