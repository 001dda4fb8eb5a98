#include "testing/gpu_limits.h"

#include <atomic>

#include "testing/cuda_types.h"

namespace panfpn::cuda_on_host {
namespace {

std::atomic<size_t> shared_kib = 64;

// CUDA C++ Programming Guide, technical specifications per compute capability: the maximum amount of shared
// memory per thread block. 0 for an unknown one.
size_t shared_kib_of(int capability) {
  switch (capability) {
    case 70:
      return 96;
    case 75:
      return 64;
    case 80:
      return 163;
    case 86:
    case 89:
    case 120:
      return 99;
    case 90:
    case 100:
      return 227;
    default:
      return 0;
  }
}

}  // namespace

bool set_compute_capability(int capability) {
  const size_t kib = shared_kib_of(capability);
  if (kib != 0) shared_kib = kib;
  return kib != 0;
}

size_t most_shared_bytes() {
  return shared_kib * 1024;
}

}  // namespace panfpn::cuda_on_host

// C interface for ctypes.
extern "C" __attribute__((visibility("default"))) int panfpn_host_set_compute_capability(int capability) {
  return panfpn::cuda_on_host::set_compute_capability(capability) ? 1 : 0;
}
