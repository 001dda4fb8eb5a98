// Runs CUDA kernels on the host, so that they can be tested without a GPU: g++ compiles our .cu files as
// ordinary C++. Compile with `-x c++ -std=c++20 -DPANFPN_CUDA_ON_HOST -I csrc` and link csrc/testing/*.cpp.
// Kernels include this header only through ops/cuda/launch.cuh.
#pragma once

#include <cstddef>
#include <tuple>
#include <type_traits>
#include <utility>

#include "testing/cuda_types.h"
#include "testing/device_functions.h"
#include "testing/gpu_limits.h"
#include "testing/scheduler.h"
#include "testing/sync_functions.h"

namespace panfpn::cuda_on_host {

template <typename... Parameters>
struct Call {
  void (*kernel)(Parameters...);
  std::tuple<Parameters...> arguments;
};

// Each thread gets its own copy of the arguments, as on a GPU.
template <typename... Parameters>
void call_kernel(const void* call) {
  const auto& typed = *static_cast<const Call<Parameters...>*>(call);
  std::apply(typed.kernel, typed.arguments);
}

template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            cudaStream_t, Arguments&&... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments),
                "a launch must pass every parameter of the kernel: default arguments are not supported");
  static_assert((std::is_trivially_copyable_v<Parameters> && ...),
                "kernel parameters are copied bytewise, so they must be trivially copyable");
  static_assert(!(std::is_reference_v<Parameters> || ...), "kernel parameters cannot be references");
  static_assert((sizeof(Parameters) + ... + 0) <= 4096, "kernel parameters take at most 4096 bytes");
  const Call<Parameters...> call{kernel, {std::forward<Arguments>(arguments)...}};
  run_grid({name, grid, block, shared_bytes}, call_kernel<Parameters...>, &call);
}

}  // namespace panfpn::cuda_on_host
