// Limits of the GPU that the host run stands for. Tests change them between launches.
#pragma once

#include <cstddef>

namespace panfpn::cuda_on_host {

// Chooses a GPU by its compute capability (90 for sm_90), which decides how much shared memory a block can
// have. The default, sm_75, has the least. Returns false for an unknown one.
bool set_compute_capability(int capability);
// The most shared memory, in bytes, that a block can opt in to.
size_t most_shared_bytes();

}  // namespace panfpn::cuda_on_host
